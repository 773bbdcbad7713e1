"""The processes in which tests run programs are as fresh as they say, and end as those of `subprocess` do."""

import os
import signal


def test_a_fresh_process_knows_neither_graft_nor_transformers_nor_what_another_imported(fresh):
    asked = "import sys; print(sorted({'graft', 'transformers', 'huggingface_hub', 'decimal'} & set(sys.modules)))"
    assert fresh.run(f"{asked}; import graft.errors, transformers, decimal").stdout == fresh.run(asked).stdout
    assert not {"graft", "transformers", "huggingface_hub"} & set(eval(fresh.run(asked).stdout))


def test_words_places_and_the_end_are_those_of_a_command(fresh, tmp_path):
    program = "import os, sys; print(sys.argv, os.getcwd(), os.environ['HERE']); sys.exit(sys.argv[1])"
    done = fresh.run(program, "gone wrong", 2, cwd=tmp_path, env={**os.environ, "HERE": "there"})
    assert done.stdout == f"['-c', 'gone wrong', '2'] {tmp_path} there\n"
    assert (done.returncode, done.stderr) == (1, "gone wrong\n")
    assert fresh.run("raise SystemExit(3)").returncode == 3
    assert fresh.run("").returncode == 0
    failed = fresh.run("1 / 0")
    assert failed.returncode == 1
    assert "ZeroDivisionError" in failed.stderr


def test_a_process_is_killed_at_a_moment_or_ends_before(fresh, tmp_path):
    counts = "import sys, time\nfor n in range(10**6):\n    open(sys.argv[1], 'a').write('x'); time.sleep(0.01)"
    process = fresh.start(counts, tmp_path / "count")
    assert process.kill_when(lambda: (tmp_path / "count").exists() and (tmp_path / "count").stat().st_size >= 3)
    assert process.returncode == -signal.SIGKILL
    assert 3 <= (tmp_path / "count").stat().st_size < 10**6
    assert not fresh.start("").kill_when(lambda: False)


def test_where_one_of_several_fails_the_others_are_ended(fresh, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os, time\nassert os.environ['RANK'] == '0', 'of two'\ntime.sleep(10**6)")
    try:
        fresh.together(script)
    except AssertionError as error:
        assert "of two" in str(error)
    else:
        raise AssertionError("nothing was said")
