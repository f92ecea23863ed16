"""What only a GPU can show: graphs, CuPy arrays, cache ops on its memory, and a model's answers on it.

    PAGEDCORE_TEST_DEVICE=cuda python -m pytest tests/device        (`make gpu-check-core` does that)

Without the variable the same bodies run on the CPU, except those that need a GPU.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from pagedcore import ops
from reference import SHARED, check, make_batch, sharing

DEVICE = os.environ.get("PAGEDCORE_TEST_DEVICE", "cpu")
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: PAGEDCORE_TEST_DEVICE=cuda")
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@FLOATS
def test_cache_ops_on_the_device(dtype: torch.dtype) -> None:
    """Write, copy, zero, gather and scatter give the same bytes as on the CPU."""
    results = []
    for device in ("cpu", DEVICE):
        generator = torch.Generator().manual_seed(0)
        cache = torch.randn(8, 2, 16, 64, generator=generator).to(dtype).to(device)
        key = torch.randn(5, 2, 64, generator=generator).to(dtype).to(device)
        slots = torch.tensor([3, -1, 17, 40, 127], device=device)
        ops.reshape_and_cache(key, key, cache, cache, slots)
        ops.copy_blocks(cache, torch.tensor([[1, 5], [2, 6]], dtype=torch.int32, device=device))
        ops.zero_blocks(cache, torch.tensor([4], dtype=torch.int32, device=device))
        blocks = torch.tensor([6, 0, 2], dtype=torch.int32, device=device)
        staging = torch.empty(3, *cache.shape[1:], dtype=dtype, device=device)
        ops.gather_blocks(cache, blocks, staging)
        ops.scatter_blocks(cache, torch.tensor([7, 3, 1], dtype=torch.int32, device=device), staging)
        results.append((cache.cpu(), staging.cpu()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_table_updates_on_the_device() -> None:
    table = torch.zeros(4, 6, dtype=torch.int32, device=DEVICE)
    ops.update_block_table(table, torch.tensor([[0, 0, 9], [3, 5, 8]], dtype=torch.int32, device=DEVICE))
    assert table[0, 0] == 9
    assert table[3, 5] == 8
    assert int(table.sum()) == 17


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_graph_replays_at_other_lengths(dtype: torch.dtype) -> None:
    """Captured at one set of lengths, replayed at others, with empty rows: the plan is made anew each time."""
    batch = make_batch([300, 300, 300, 300], [1] * 4, dtype=dtype, heads=(8, 2), head_dim=128)
    query, k_cache, v_cache, table, seq_lens, starts = (tensor.cuda() for tensor in batch.args)
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:2], device="cuda")
    shapes = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 128, "max_query_len": 1, "dtype": dtype}
    plan = ops.plan_attention(seq_lens, starts, **shapes)
    workspace = torch.empty(
        ops.attention_workspace_size(4, 4, 8, 2, 128, dtype=dtype), dtype=torch.uint8, device="cuda"
    )
    ops.warmup()

    def step() -> None:
        ops.plan_attention(seq_lens, starts, out=plan, **shapes)
        for _ in range(2):  # layers
            ops.paged_attention(
                query, k_cache, v_cache, table, seq_lens, starts, out=out, lse=lse, plan=plan, workspace=workspace,
                max_query_len=1,
            )  # fmt: skip

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for lengths in ([300, 300, 300, 300], [1, 299, 0, 16], [17, 0, 0, 64], [0, 0, 0, 0], [300, 2, 65, 128]):
        batch.seq_lens = torch.tensor(lengths, dtype=torch.int32)
        seq_lens.copy_(batch.seq_lens)
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        check(batch, out.cpu(), lse.cpu())


@FLOATS
def test_a_shared_prefix_on_the_device(dtype: torch.dtype) -> None:
    """With padding last; a row may have the roundings of three outputs."""
    batch = sharing([1, 16, 17, 200, 0, 0], [1] * 6, dtype=dtype, heads=(8, 2))
    args = [tensor.to(DEVICE) for tensor in batch.args]
    out, lse = ops.cascade_attention(*args, num_shared_blocks=SHARED, return_lse=True, max_query_len=1)
    check(batch, out.cpu(), lse.cpu(), row_factor=5, whole_references=DEVICE != "cpu")


@on_gpu
@pytest.mark.parametrize("planned", [False, True])
def test_a_shared_prefix_in_a_graph(planned: bool) -> None:
    """Nothing is read back or allocated: captured at one set of lengths, replayed at others and with padding."""
    batch = sharing([250, 250, 250, 250], [1] * 4, dtype=torch.float16, heads=(8, 2), head_dim=128)
    query, k_cache, v_cache, table, seq_lens, starts = (tensor.cuda() for tensor in batch.args)
    out, lse = torch.empty_like(query), torch.empty(query.shape[:2], device="cuda")
    size = ops.cascade_workspace_size(4, 4, 8, 2, 128, dtype=torch.float16)
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
    shapes = {"num_shared_blocks": SHARED, "block_size": 16, "num_heads": 8, "num_kv_heads": 2, "head_dim": 128}
    memory = torch.empty(ops.cascade_plan_size(4, 4, 8, 2, 128, dtype=torch.float16), dtype=torch.uint8, device="cuda")
    ops.warmup()

    def step() -> None:
        plan = None
        if planned:
            plan = ops.plan_cascade(seq_lens, starts, **shapes, max_query_len=1, dtype=torch.float16, out=memory)
        ops.cascade_attention(
            query, k_cache, v_cache, table, seq_lens, starts, num_shared_blocks=SHARED, out=out, lse=lse,
            workspace=workspace, max_query_len=1, plan=plan,
        )  # fmt: skip

    with torch.cuda.stream(torch.cuda.Stream()):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for own in ([250, 250, 250, 250], [1, 249, 17, 16], [64, 2, 0, 0], [0, 0, 0, 0]):
        batch.seq_lens = torch.tensor([16 * SHARED + n if n else 0 for n in own], dtype=torch.int32)
        seq_lens.copy_(batch.seq_lens)
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        check(batch, out.cpu(), lse.cpu(), row_factor=5, whole_references=True)


@on_gpu
def test_cupy_arrays() -> None:
    """By `__cuda_array_interface__`, with outputs allocated by CuPy."""
    cupy = pytest.importorskip("cupy")
    batch = make_batch([40, 7], [1, 3], dtype=torch.float16)
    args: list[Any] = [cupy.asarray(tensor.numpy()) for tensor in batch.args]
    out, lse = ops.paged_attention(*args, return_lse=True)
    assert type(out).__module__.startswith("cupy")
    check(batch, torch.from_numpy(cupy.asnumpy(out)), torch.from_numpy(cupy.asnumpy(lse)))


@on_gpu
def test_many_streams() -> None:
    """The op runs on torch's current stream: work before it there is seen."""
    batch = make_batch([200, 64], [1, 1], dtype=torch.bfloat16)
    args = [tensor.cuda() for tensor in batch.args]
    outs = []
    for _ in range(4):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            later = torch.zeros_like(args[0])
            torch.cuda._sleep(20_000_000)
            later.copy_(args[0])
            outs.append(ops.paged_attention(later, *args[1:]))
    torch.cuda.synchronize()
    for out in outs:
        check(batch, out.cpu())


def test_a_model_that_waits_for_the_device_is_served_without_graphs(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its recording fails half-way. The answers are right all the same, and torch's allocator and generator are as
    before: memory can be freed, numbers drawn, and the next model recorded.
    """
    from models import save_tiny_model
    from pagedcore import LLM, SamplingParams
    from transformers.models.llama.modeling_llama import LlamaMLP

    model = save_tiny_model("llama", tmp_path / "model")
    forward = LlamaMLP.forward

    def waits(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        result = forward(self, hidden)
        assert result.sum().item() == result.sum().item()
        return result

    def answers(device: str) -> tuple[list[list[int]], list[int]]:
        llm = LLM(str(model), dtype="float32", num_blocks=64, max_num_seqs=4, max_model_len=128, device=device)
        results = llm.generate([[5, 6, 7], list(range(3, 40))], SamplingParams(max_tokens=24, temperature=0.0))
        recorded = getattr(llm.engine._runner, "_graphs", None)
        llm.close()
        return [list(result.outputs[0].token_ids) for result in results], recorded.sizes if recorded else []

    expected, _ = answers("cpu")
    monkeypatch.setattr(LlamaMLP, "forward", waits)
    with caplog.at_level("WARNING", logger="pagedcore"):
        got, sizes = answers(DEVICE)
    assert got == expected
    assert sizes == []
    warnings = [record for record in caplog.records if "without CUDA graphs" in record.getMessage()]
    assert len(warnings) == (DEVICE != "cpu")
    monkeypatch.undo()
    if DEVICE != "cpu":
        torch.cuda.empty_cache()
    assert torch.rand(3, device=DEVICE).isfinite().all()
    assert answers(DEVICE) == (expected, [1, 2, 4] if DEVICE != "cpu" else [])


@on_gpu
def test_greedy_answers_of_a_tiny_model(tmp_path: Any) -> None:
    """A Llama with random weights in float32 answers on the device as on the CPU, token for token."""
    from models import save_tiny_model
    from pagedcore import LLM, SamplingParams

    model = save_tiny_model("llama", tmp_path / "model")
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in (1, 7, 16, 33, 60)]
    answers = []
    for device in ("cpu", DEVICE):
        llm = LLM(str(model), dtype="float32", num_blocks=64, max_num_seqs=4, max_model_len=128, device=device)
        results = llm.generate(prompts, SamplingParams(max_tokens=24, temperature=0.0))
        answers.append([list(result.outputs[0].token_ids) for result in results])
        llm.close()
    assert answers[0] == answers[1]
