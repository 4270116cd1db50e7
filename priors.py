"""Prior constraints for reward model training (PCRM, arXiv 2404.00978).

A reward model that is trained with the ranking loss alone is always paid for a larger margin, also when the two
responses of a pair are nearly the same. PCRM bounds each pair's margin by a prior: how alike its responses are.

    margin      m  = r(x, chosen) - r(x, rejected)
    similarity  s  in (0, 1], 1 for two equal responses                       length_ratio, cosine_similarity
    bound       δ* = β1 / (s + β2) + β3, a constant for the gradient          margin_bound
    loss        L  = -log σ(m) - log σ(δ* - m)                                constrained_ranking_loss

L is one function used twice, `ranking_loss(m) + ranking_loss(δ* - m)`. It is convex and symmetric around its minimum at
m = δ*/2: a margin is pushed towards half of its bound, weakly where the responses differ (δ* is large, and the second
term nearly zero) and strongly where they are alike.

This file needs torch alone (`encode_texts` also transformers) and nothing else of this repository: copy it anywhere.
Similarities and bounds belong to the data, not to the step: compute them once, before training, and keep them in the
pair's own row. Their values are checked where they are made; the loss checks shapes only and never makes a GPU wait.

Symbols in the shapes: B pairs, H width of an embedding, N texts.
"""

import math

import torch
import torch.nn.functional as F


def length_ratio(chosen_lengths: torch.Tensor, rejected_lengths: torch.Tensor) -> torch.Tensor:
    """Similarity as the shorter length over the longer one (constraint `len_rat`).

    Args:
        chosen_lengths, rejected_lengths: (B,) response lengths in tokens, EOS included, at least 1. The paper's authors
            count from the first token at which the two sequences of the pair differ.
    Returns:
        (B,) fp32 in (0, 1]. ValueError for shapes that differ, or a length below 1.
    """
    _same_shape(chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    shorter = torch.minimum(chosen_lengths, rejected_lengths).float()  # B
    longer = torch.maximum(chosen_lengths, rejected_lengths).float()  # B
    _require(shorter >= 1, shorter, "a response length is at least 1 token (EOS counts)")
    return shorter / longer  # B


def cosine_similarity(
    chosen_embeddings: torch.Tensor, rejected_embeddings: torch.Tensor, angular: bool = True
) -> torch.Tensor:
    """Similarity of two embeddings (constraint `cos_sim`).

    Args:
        chosen_embeddings, rejected_embeddings: (B, H) embeddings of prompt + response.
        angular: clamp the cosine to [0, 1] and return (π - arccos(cosine)) / π, in [0.5, 1]: near 1 the angle still
            tells pairs apart that all have a cosine of about 1. False returns the raw cosine, in [-1, 1].
    Returns:
        (B,) fp32. ValueError for shapes that differ, or an embedding that is zero or not finite.
    """
    _same_shape(chosen_embeddings=chosen_embeddings, rejected_embeddings=rejected_embeddings)
    # fp64: arccos is steep at 1, where rounding the cosine to fp32 would move the angle by up to 3e-4.
    chosen, rejected = chosen_embeddings.double(), rejected_embeddings.double()  # B H
    for name, norm in (("chosen", chosen.norm(dim=-1)), ("rejected", rejected.norm(dim=-1))):
        _require(norm.isfinite(), norm, f"the norm of a {name} embedding is not finite")
        _require(norm > 0, norm, f"a {name} embedding is zero and has no direction")
    cosine = F.cosine_similarity(chosen, rejected, dim=-1, eps=0.0)  # B
    if angular:
        return ((math.pi - torch.arccos(cosine.clamp(0, 1))) / math.pi).float()  # B
    return cosine.clamp(-1, 1).float()  # B


@torch.no_grad()
def margin_bound(similarity: torch.Tensor, beta1: float, beta2: float = 1e-3, beta3: float = 0.0) -> torch.Tensor:
    """The prior bound of each pair's margin, δ* = β1 / (s + β2) + β3.

    β1 says how fast the bound loosens as the responses differ, β3 moves its floor δ*(1), β2 keeps the fraction finite.
    The paper's settings have δ*(1) ≈ 5, such as (20, 0.001, -15).

    similarity (B,) is from `length_ratio` or `cosine_similarity`; returns (B,) fp32, detached. ValueError unless each
    bound is positive and finite.
    """
    bound = beta1 / (similarity.float() + beta2) + beta3  # B
    reason = f"beta1 / (s + beta2) + beta3 must be positive and finite, but {beta1=}, {beta2=}, {beta3=} give"
    _require((bound > 0) & bound.isfinite(), bound, reason)
    return bound


def fixed_bound(count: int, value: float) -> torch.Tensor:
    """One bound for all pairs, the paper's control `fixed`: (count,) fp32. ValueError unless 0 < value < inf."""
    if not 0 < value < math.inf:
        raise ValueError(f"a fixed bound must be positive and finite, not {value}")
    return torch.full((count,), float(value))  # B


def random_bound(count: int, low: float, high: float, seed: int) -> torch.Tensor:
    """Bounds without a prior, the paper's control `random`: U(low, high) for each pair, (count,) fp32.

    A function of its arguments alone: with another seed each epoch, row i's bound depends on the row and the epoch
    only, whatever the order or the number of processes. ValueError unless 0 < low <= high < inf.
    """
    if not 0 < low <= high < math.inf:
        raise ValueError(f"a random bound needs 0 < low <= high < inf, not low={low}, high={high}")
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(count, generator=generator)  # B


def pair_bounds(
    similarity: torch.Tensor,
    constraint: str,
    betas: tuple[float, float, float] = (20.0, 1e-3, -15.0),
    fixed: float = 4.5,
    low_high: tuple[float, float] = (4.0, 5.0),
    seed: int = 0,
) -> torch.Tensor:
    """The bound δ* of each pair under a constraint, (n,); NaN where there is none.

    Args:
        similarity: (n,), of all pairs.
        constraint: "none"; "len_rat", "cos_sim" or "given", whose similarity makes the bound; "fixed"; "random".
        betas: β1, β2, β3 of `margin_bound`.
        fixed, low_high, seed: of the controls, see `fixed_bound` and `random_bound`.
    """
    if constraint in ("len_rat", "cos_sim", "given"):
        return margin_bound(similarity, *betas)
    if constraint == "random":
        return random_bound(len(similarity), *low_high, seed)
    if constraint == "fixed":
        return fixed_bound(len(similarity), fixed)
    if constraint != "none":
        raise ValueError(f"no constraint has the name {constraint!r}")
    return torch.full((len(similarity),), math.nan)


def ranking_loss(margin: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """-log σ(m), the ranking loss. With ε = label_smoothing, the share of labels taken to be wrong, in [0, 0.5]:
    -(1-ε) log σ(m) - ε log σ(-m). For each element, in margin's shape and finite for every finite margin."""
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing is the share of wrong labels, between 0 and 0.5, not {label_smoothing}")
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def constrained_ranking_loss(
    margin: torch.Tensor, bound: torch.Tensor | None = None, label_smoothing: float = 0.0
) -> torch.Tensor:
    """-log σ(m) - log σ(δ* - m), the loss of PCRM; without a bound the ranking loss -log σ(m).

    Args:
        margin: any shape, m: the chosen response's score minus the rejected one's (DPO: its z).
        bound: the same shape, δ*; no gradient flows into it.
        label_smoothing: ε of `ranking_loss`, in both terms.
    Returns:
        The loss of each element, in margin's shape: average it yourself. ValueError where shapes differ.
    """
    if bound is None:
        return ranking_loss(margin, label_smoothing)
    _same_shape(margin=margin, bound=bound)
    return ranking_loss(margin, label_smoothing) + ranking_loss(bound.detach() - margin, label_smoothing)


@torch.no_grad()
def encode_texts(
    texts: list[str],
    encoder: str,
    pooling: str = "cls",
    max_length: int = 512,
    batch_tokens: int = 8192,
    device="cpu",
    trust_remote_code: bool = False,
    progress=lambda batches: batches,
) -> torch.Tensor:
    """Embed texts with a frozen Hugging Face encoder, the input of `cosine_similarity`.

    Each different text is encoded once, in batches of like length. A causal language model serves with "mean" pooling.

    Args:
        texts: N strings; for a response's similarity, prompt and response joined.
        encoder: a folder or Hub id that `AutoModel` loads, such as "google-bert/bert-base-uncased".
        pooling: "cls", the last hidden state of the first token (the paper's), or "mean" over the text's tokens.
        max_length: in tokens, special ones included; fewer where the encoder takes fewer. Longer texts lose their
            beginning, since the responses of a pair differ at the end.
        batch_tokens: how many tokens, padding included, one batch may hold.
        progress: wraps the list of batches, for a progress bar, such as `tqdm.tqdm`.
    Returns:
        (N, H) fp32 on the CPU. ValueError for another pooling, or "cls" with a causal encoder.
    """
    from transformers import AutoModel, AutoTokenizer

    if pooling not in ("cls", "mean"):
        raise ValueError(f"pooling is 'cls' or 'mean', not {pooling!r}")
    tokenizer = AutoTokenizer.from_pretrained(encoder, trust_remote_code=trust_remote_code, truncation_side="left")
    model = AutoModel.from_pretrained(encoder, trust_remote_code=trust_remote_code, use_safetensors=True)
    model = model.to(device).eval()
    places = getattr(getattr(model, "embeddings", None), "position_embeddings", None)  # RoBERTa's begin behind padding
    reserved = 0 if getattr(places, "padding_idx", None) is None else places.padding_idx + 1
    positions = (getattr(model.config, "max_position_embeddings", None) or max_length) - reserved
    max_length = min(max_length, tokenizer.model_max_length, positions)
    unique = list(dict.fromkeys(texts))
    ids = tokenizer(unique, truncation=True, max_length=max_length).input_ids if unique else []
    order = sorted(range(len(unique)), key=lambda i: -len(ids[i]))  # the longest first: a lack of memory shows at once
    batches, start = [], 0
    while start < len(order):
        size = max(1, batch_tokens // max(1, len(ids[order[start]])))
        batches.append(order[start : start + size])
        start += size

    embeddings = {}  # text: H
    for batch in progress(batches):
        rows = [torch.tensor(ids[i], device=device) for i in batch]
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, True, tokenizer.pad_token_id or 0)  # B T; padding is masked
        lengths = torch.tensor([len(row) for row in rows], device=device)[:, None]  # B 1
        is_text = torch.arange(input_ids.shape[1], device=device) < lengths  # B T
        hidden = model(input_ids=input_ids, attention_mask=is_text.long()).last_hidden_state.float()  # B T H
        if pooling == "cls" and not embeddings and input_ids.shape[1] > 1:
            alone = model(input_ids=input_ids[:1, :1]).last_hidden_state.float()  # 1 1 H
            if torch.allclose(alone, hidden[:1, :1], rtol=1e-3, atol=1e-5):
                raise ValueError("this encoder is causal, its first token sees only itself: pooling must be 'mean'")
        pooled = hidden[:, 0] if pooling == "cls" else (hidden * is_text[..., None]).sum(1) / lengths  # B H
        embeddings |= zip([unique[i] for i in batch], pooled.cpu())
    return torch.stack([embeddings[text] for text in texts]) if texts else torch.empty(0, model.config.hidden_size)


def _same_shape(**tensors: torch.Tensor) -> None:
    (name, first), (other, second) = tensors.items()
    if first.shape != second.shape:
        raise ValueError(f"{name} has the shape {tuple(first.shape)}, but {other} has {tuple(second.shape)}")


def _require(condition: torch.Tensor, values: torch.Tensor, reason: str) -> None:
    """ValueError with the first of `values` for which `condition` is False."""
    if not bool(condition.all()):
        index = int((~condition).flatten().nonzero()[0])
        raise ValueError(f"{reason}: {values.flatten()[index].item():g} at index {index}")
