"""Which model proposes for another, and whether the two fit together. No torch."""

from __future__ import annotations

from pathlib import Path

from .model_shape import BadModel, ModelShape, read_json, resolve_model
from .parallel import Layout, keeps_scales_whole, tensor_parallel_sizes
from .spec import BadSpec, Pool

_TOKENIZER = "tokenizer.json"


def draft_shape(pool: Pool) -> ModelShape | None:
    """The shape of a pool's draft model; None: it has none. Raises: BadModel."""
    return ModelShape.load(resolve_model(pool.draft_model)) if pool.draft_model else None


def check_draft(pool: Pool, shape: ModelShape) -> None:
    """Whether a pool's draft model, if it has one, can propose for a model of this shape.

    Raises: BadSpec, naming the field; BadModel.
    """
    draft = draft_shape(pool)
    if draft is None:
        return
    draft.check_served()
    field = "pools.0.draft_model"
    if draft.vocab_size != shape.vocab_size:
        found = f"{draft.vocab_size} tokens in {pool.draft_model}"
        raise BadSpec(field, found, f"a model of the same vocabulary, {shape.vocab_size} tokens")
    if draft.max_position_embeddings < pool.max_model_len:
        found = f"{draft.max_position_embeddings} tokens at most in {pool.draft_model}"
        raise BadSpec(field, found, f"a model for max_model_len, {pool.max_model_len} tokens, or more")
    if draft.sliding_window is not None and pool.max_model_len > draft.sliding_window:
        found = f"a window of {draft.sliding_window} tokens in {pool.draft_model}"
        raise BadSpec(field, found, f"a model with no window that is active up to max_model_len, {pool.max_model_len}")
    if pool.weight_dtype == "ternary" and draft.ternary is None:
        raise BadSpec(field, pool.draft_model, "a model that was trained ternary, as weight_dtype is")
    experts = draft.experts.num_experts if draft.experts else pool.tensor_parallel_size
    if pool.enable_expert_parallel and experts < pool.tensor_parallel_size:
        found = f"{experts} experts for {pool.tensor_parallel_size} ranks in {pool.draft_model}"
        raise BadSpec(field, found, "a dense model, or one with an expert for each rank, with enable_expert_parallel")
    sizes = tensor_parallel_sizes(draft)
    fits = keeps_scales_whole(draft, pool.weight_dtype, Layout.of(pool))
    if pool.tensor_parallel_size not in sizes or not fits:
        found = f"layers that {pool.tensor_parallel_size} ranks cannot share in {pool.draft_model}"
        raise BadSpec(field, found, "a model that tensor_parallel_size divides, too")


def check_same_tokens(draft_dir: Path, model_dir: Path) -> None:
    """Whether two models of equal vocabulary sizes mean the same by their tokens, where both say what they mean.

    Raises: BadModel: the draft's tokenizer has another vocabulary, so that nothing it proposes would be kept.
    """
    files = [folder / _TOKENIZER for folder in (draft_dir, model_dir)]
    if not all(file.is_file() for file in files):
        return
    mine, its = (read_json(file).get("model", {}).get("vocab") for file in files)
    if mine != its:
        todo = "take a draft model that was trained with the same tokenizer"
        raise BadModel(f"{files[0]}: model.vocab", "another vocabulary", f"that of {files[1]}", todo)


def draft_pool(pool: Pool) -> Pool:
    """The pool as the draft model's memory and step times see it: without a draft of its own, and without adapters."""
    return pool.model_copy(
        update={
            "speculation": "none",
            "num_speculative_tokens": 0,
            "draft_model": "",
            "max_loras": 0,
            "max_cpu_loras": 0,
        }
    )
