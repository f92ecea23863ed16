"""The loop of a server with a model of its own: the scheduler's plans, and attention over blocks. Needs only NumPy.

    python docs/examples/own_model.py

The model is one layer of attention with random weights, so what it says is noise; but it is the same noise that the
layer gives without any cache, which is compared at the end.
"""

from __future__ import annotations

import numpy as np
from pagedcore import KVCacheLayout, Scheduler, SchedulerConfig, StepPlan, ops

VOCAB, HEADS, KV_HEADS, DIM = 100, 4, 2, 16
WIDTH = HEADS * DIM
PROMPTS = {"short": [7, 3], "long": list(range(40)), "twice": [5, 6, 7, 8, 9]}
ANSWERS = {"twice": 2}  # to this prompt; one to the others
MAX_TOKENS = 12


class Model:
    """One attention layer between an embedding and logits, over a paged cache."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        rng = np.random.default_rng(0)
        self.embedding = rng.standard_normal((VOCAB, WIDTH), np.float32)
        self.to_query = rng.standard_normal((WIDTH, WIDTH), np.float32) / 3
        self.to_key, self.to_value = rng.standard_normal((2, WIDTH, KV_HEADS * DIM), np.float32) / 8
        self.to_logits = rng.standard_normal((WIDTH, VOCAB), np.float32)
        self.kv = KVCacheLayout(num_blocks, block_size, 1, KV_HEADS, DIM, "float32").allocate()

    def embed(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Float32 [num_tokens, WIDTH]."""
        angles = positions[:, None] / 50.0 ** (np.arange(WIDTH) / WIDTH)
        return self.embedding[tokens] + np.sin(angles, dtype=np.float32)

    def forward(self, plan: StepPlan) -> np.ndarray:
        """Logits [len(plan.logits_indices), VOCAB] of a step."""
        ops.zero_blocks(self.kv, plan.blocks_to_zero)  # in this order: zero, copy, write, attend
        ops.copy_blocks(self.kv, plan.block_copies)
        x = self.embed(plan.input_ids, plan.positions)
        query = (x @ self.to_query).reshape(-1, HEADS, DIM)
        key = (x @ self.to_key).reshape(-1, KV_HEADS, DIM)
        value = (x @ self.to_value).reshape(-1, KV_HEADS, DIM)
        k_cache, v_cache = self.kv.layer(0)
        ops.reshape_and_cache(key, value, k_cache, v_cache, plan.slot_mapping)
        out = ops.paged_attention(query, k_cache, v_cache, plan.block_table, plan.seq_lens, plan.query_start_loc)
        return out.reshape(-1, WIDTH)[plan.logits_indices] @ self.to_logits

    def without_cache(self, tokens: list[int]) -> np.ndarray:
        """The logits after the last of these tokens, all computed anew."""
        x = self.embed(np.array(tokens), np.arange(len(tokens)))
        key = np.repeat((x @ self.to_key).reshape(-1, KV_HEADS, DIM), HEADS // KV_HEADS, axis=1)
        value = np.repeat((x @ self.to_value).reshape(-1, KV_HEADS, DIM), HEADS // KV_HEADS, axis=1)
        scores = np.einsum("hd,khd->hk", (x[-1] @ self.to_query).reshape(HEADS, DIM), key) / DIM**0.5
        weights = np.exp(scores - scores.max(1, keepdims=True))
        out = np.einsum("hk,khd->hd", weights / weights.sum(1, keepdims=True), value)
        return out.reshape(WIDTH) @ self.to_logits


def choose(logits: np.ndarray, index: int) -> int:
    """The likeliest token; for a second answer the second likeliest, so that the two differ."""
    return int(np.argsort(logits)[-1 - index])


def serve(model: Model, scheduler: Scheduler) -> dict[tuple[str, int], list[int]]:
    """Runs steps until every request has ended; each answer's tokens."""
    answers: dict[tuple[str, int], list[int]] = {}
    rows: dict[int, tuple[str, int]] = {}  # whose the scheduler's rows are
    while scheduler.has_unfinished:
        plan = scheduler.schedule()
        if plan is None:
            raise RuntimeError("nothing can run")
        rows |= {row: (request_id, index) for row, request_id, index in plan.started}
        logits = model.forward(plan)
        sampled = np.zeros(len(plan.sample_seqs), np.int32)
        for k, row in enumerate(plan.sample_seqs.tolist()):
            sampled[k] = choose(logits[k], rows[row][1])
            answers.setdefault(rows[row], []).append(int(sampled[k]))
        scheduler.update(plan.step, sampled)
    return answers


def main() -> None:
    """Answers the prompts over 9 blocks, fewer than all of them want, and compares with the layer without a cache."""
    config = SchedulerConfig(
        num_blocks=9, block_size=8, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=64, vocab_size=VOCAB
    )
    model = Model(config.num_blocks, config.block_size)
    scheduler = Scheduler(config)
    for name, prompt in PROMPTS.items():
        scheduler.add_request(name, prompt, max_tokens=MAX_TOKENS, n=ANSWERS.get(name, 1))
    for (name, index), answer in serve(model, scheduler).items():
        tokens = list(PROMPTS[name])
        for _ in answer:
            tokens.append(choose(model.without_cache(tokens), index))
        same = tokens[len(PROMPTS[name]) :] == answer
        print(f"{name}[{index}]: {answer}  {'as' if same else 'NOT as'} without a cache")


if __name__ == "__main__":
    main()
