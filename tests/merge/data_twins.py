"""Methods that read data once more, the slow way: float64, whole models, one example and one layer after the other."""

import numpy as np
import torch


def fisher(model, rows):
    """Mean square over rows of the gradient of a row's summed log-probability, divided by the tokens of a row."""
    sums = {name: 0.0 for name, _ in model.named_parameters()}
    tokens = 0
    for row in rows:
        model.zero_grad()
        log_probs = torch.log_softmax(model(input_ids=row[None]).logits[0, :-1].double(), -1)
        (-sum(log_probs[t, token] for t, token in enumerate(row[1:]))).backward()
        tokens += len(row) - 1
        for name, parameter in model.named_parameters():
            sums[name] = sums[name] + parameter.grad.double() ** 2
    model.zero_grad()
    return {name: (total / tokens).numpy() for name, total in sums.items()}


def exact_fisher(model, row):
    """The Fisher information of a row whose tokens are drawn one by one: every token of the vocabulary, weighted."""
    sums = {name: 0.0 for name, _ in model.named_parameters()}
    for t in range(len(row) - 1):
        for token in range(model.config.vocab_size):
            model.zero_grad()
            log_probs = torch.log_softmax(model(input_ids=row[None]).logits[0, t], -1)
            log_probs[token].backward()
            for name, parameter in model.named_parameters():
                sums[name] = sums[name] + float(log_probs[token].exp()) * parameter.grad.double() ** 2
    model.zero_grad()
    return {name: (total / (len(row) - 1)).numpy() for name, total in sums.items()}


def regmean(models, grams, weights, alpha):
    scaled = [alpha * g + (1 - alpha) * np.diag(np.diag(g)) for g in grams]
    left = sum(w * g for w, g in zip(weights, scaled, strict=True))
    right = sum(w * m @ g for w, m, g in zip(weights, models, scaled, strict=True))
    return right @ np.linalg.inv(left)


def gram(inputs):
    """Mean outer product of inputs [n, in]."""
    return sum(np.outer(x, x) for x in inputs) / len(inputs)


def inputs_of(model, layer, rows):
    """[n, in] float64: what a layer is given at every token of the rows."""
    found = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _, args, __: found.append(args[0].detach()))
    with torch.no_grad():
        for row in rows:
            model(input_ids=row[None])
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in found]).double().numpy()


def regmean_plus(models, rows, weights, alpha, layers):
    """`models` of one class, `rows` of each; `layers`: names of the linear layers of each block, then of the rest.

    Every step runs whole models: merged blocks in front, the model's own block behind, whatever it is after that.
    """
    share = [w / sum(weights) for w in weights]
    states = [{name: value.double() for name, value in model.state_dict().items()} for model in models]
    merged = {name: sum(w * state[name] for w, state in zip(share, states, strict=True)) for name in states[0]}
    model = models[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for prefix, names in layers:
        made = {}
        for name in names:
            grams = []
            for state, own in zip(states, rows, strict=True):
                mixed = merged | {key: value for key, value in state.items() if prefix and key.startswith(prefix)}
                model.load_state_dict({key: value.float() for key, value in mixed.items()})
                grams.append(gram(inputs_of(model, name, own)))
            weight = f"{name}.weight"
            made[weight] = torch.tensor(regmean([s[weight].numpy() for s in states], grams, weights, alpha))
        merged |= made
    model.load_state_dict(before)
    return {name: value.numpy() for name, value in merged.items()}


def composed(base, deltas, lambdas):
    """`{parameter: θ₀ + sum_m λ_m δ_m}`, differentiable; `lambdas(parameter)` gives the λ."""
    return {
        name: value + sum(factor * delta[name] for factor, delta in zip(lambdas(name), deltas, strict=True))
        for name, value in base.items()
    }


def entropy(logits):
    probabilities = torch.softmax(logits, -1)
    return -(probabilities * torch.log(probabilities)).sum(-1)
