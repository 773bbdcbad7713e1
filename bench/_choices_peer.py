"""lm-eval's side of evaluate_choices.py: MODEL REQUESTS.json → seconds a request, log-likelihoods."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main() -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder, path = sys.argv[1:]
    pairs = json.loads(Path(path).read_text())
    model = HFLM(pretrained=folder, batch_size=8, device="cpu", dtype="float32")
    made = [Instance("loglikelihood", {}, (context, choice), i) for i, (context, choice) in enumerate(pairs)]
    start = time.perf_counter()
    answers = model.loglikelihood(made, disable_tqdm=True)
    seconds = time.perf_counter() - start
    print(json.dumps({"per_request": seconds / len(pairs), "log_probs": [float(a[0]) for a in answers]}))


if __name__ == "__main__":
    main()
