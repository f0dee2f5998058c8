"""Kernels and bytes of one layer, in training and in decoding, counted without running it: prints Markdown tables.

    python scripts/count_kernels.py                     # the published size, four clips; takes a minute or two
    python scripts/count_kernels.py --task interpolation --batch 2

In training, a layer with a frozen trunk, in bfloat16, neither the first nor the last, run by PyTorch on fake tensors:

    blocks    `train.attention=sdpa`, one operation after another
    joined    one attention call per channel, one operation after another
    compiled  the same, its operations fused by Inductor (by its rules for CPUs, which are close to those for GPUs)

And in decoding, a step for one slot of one guided clip, halfway through:

    layer     as the model's own layer computes it, reading the whole cache
    joint     both channels in joint products, reading only cache blocks that are filled and in the window
    compiled  the same, fused

A kernel is an operation other than a view, or a group that Inductor fused. Bytes are those of its inputs and outputs,
each read or written once: what attention keeps in registers is not counted, and hardware caches are ignored. Attention
counts as one kernel forward and two backward, as in FlexAttention.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import detect_fake_mode
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.reinplace import reinplace_inplaceable_ops
from torch._inductor.fx_utils import FakeTensorUpdater
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cogvideo.inference.backends import ChannelKV
from cogvideo.model import attention as attention_module
from cogvideo.model.attention import AttentionImplementation, ChannelContext, attend_block
from cogvideo.model.config import ModelConfig
from cogvideo.model.decode import DecodeLayer
from cogvideo.model.joined import BLOCK_SIZE, JoinedMask, KeyBlocks
from cogvideo.model.masks import channel_masks
from cogvideo.model.plan import CachePositions, DecodeMasks, TablePlan, plan_clip, window_positions, with_text
from cogvideo.model.transformer import CogVideoTransformer, TransformerLayer, compile_layer

ALLOCATIONS = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "_unsafe_view")


@torch.library.custom_op("count::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Stands in for FlexAttention, whose backward pass cannot be traced for a CPU: outputs and log-sum-exp."""
    return torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("count::attention_delta", mutates_args=())
def attention_delta(grad: Tensor, out: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("count::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor, delta: Tensor, query: Tensor, key: Tensor, value: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


for _operation in (attention, attention_delta, attention_backward):
    _operation.register_fake(_operation._init_fn)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, out, logsumexp = ctx.saved_tensors
    return attention_backward(grad, attention_delta(grad, out), query, key, value, logsumexp)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


attention.register_autograd(_backward, setup_context=_save)


def attend(query: Tensor, key: Tensor, value: Tensor, text_bias: Tensor, mask: JoinedMask, dropout: float) -> Tensor:
    return attention(query, key, value)[0]


@dataclass
class Count:
    kernels: int = 0
    num_bytes: int = 0

    def __str__(self) -> str:
        return f"{self.kernels} | {self.num_bytes / 1e9:.2f}"


def _stored_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes in memory; for an expanded tensor, those of its storage."""
    return sum(min(x.numel() * x.itemsize, x.untyped_storage().nbytes()) for x in {id(x): x for x in tensors}.values())


class Operations(TorchDispatchMode):
    """Counts the operations that PyTorch dispatches one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Count()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [[x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), out)]
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if tensors[1] and not is_view and func.overloadpacket.__name__ not in ALLOCATIONS:
            self.count.kernels += 1
            self.count.num_bytes += _stored_bytes([*tensors[0], *tensors[1]])
        return out


class Fusions:
    """A backend of torch.compile that counts Inductor's fused kernels, forward and backward, and runs the graph."""

    def __init__(self) -> None:
        self.counts: list[Count] = []

    def _compile(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        fake_mode = detect_fake_mode(inputs)
        with V.set_fake_mode(fake_mode):
            reinplace_inplaceable_ops(FakeTensorUpdater(graph), graph.graph)  # caches are written in place
        lowering = GraphLowering(graph, example_inputs=inputs, shape_env=None)
        with (
            V.set_fake_mode(fake_mode),
            V.set_debug_handler(DebugContext()),
            V.set_graph_handler(lowering),
            V.set_extern_kernel_nodes([]),
        ):
            lowering.run(*inputs)
            lowering._update_scheduler()
            num_bytes, by_node, _ = lowering.count_bytes()
            kernels = sum(size > 0 for _, size in by_node)
        self.counts.append(Count(kernels, num_bytes))
        return make_boxed_func(graph.forward)

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
        backend = aot_autograd(
            fw_compiler=self._compile,
            bw_compiler=self._compile,
            decompositions=select_decomp_table(),
            partition_fn=min_cut_rematerialization_partition,
            keep_inference_input_mutations=True,
        )
        return backend(graph, inputs)


def count_layer(config: ModelConfig, batch: int, text_len: int, way: str) -> tuple[Count, Count]:
    """Forward and backward of the second layer. `way`: blocks, joined or compiled."""
    joined = way != "blocks"
    plan = plan_clip(config, plan_type="joined" if joined else "blocks")
    spatial, temporal = with_text(plan.spatial, text_len), plan.temporal_at(1)
    assert temporal is not None, "a video model has a temporal channel"
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(torch.bfloat16)
        layer = TransformerLayer(config)
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(CogVideoTransformer.is_extra(f"layers.1.{name}"))
        for module in (layer.attention, layer.temporal_attention):
            module.implementation = AttentionImplementation(attend_block, attend_joined=attend)
        bias = torch.zeros(batch, text_len, dtype=torch.float32)
        text = torch.zeros(batch, text_len, config.hidden_size)
        rows = config.layout.num_slots
        frames = torch.zeros(batch, rows, config.hidden_size, requires_grad=True)
        contexts = ChannelContext(spatial, bias), ChannelContext(with_text(temporal, text_len), bias)
        if way == "compiled":
            fusions = Fusions()
            _, out = compile_layer(TransformerLayer, fusions)(layer, text, frames, *contexts)
            out.backward(torch.zeros_like(out))
            forward, backward = fusions.counts
            return forward, backward
        with Operations() as operations:
            _, out = layer(text, frames, *contexts)
            forward, operations.count = operations.count, Count()
            out.backward(torch.zeros_like(out))
        return forward, operations.count


def count_step(config: ModelConfig, text_len: int, way: str) -> Count:
    """A decoding step of the second layer. `way`: layer, joint or compiled."""
    layout, batch = config.layout, 2
    order = np.concatenate([layout.slots_of(frame) for frame in layout.generation_order])
    every_slot = np.arange(layout.num_slots)
    positions = tuple(window_positions(mask, every_slot) for mask in channel_masks(layout, config.window_size)[1])
    spatial_positions = every_slot % layout.frame_len  # one frame is in flight
    masks = DecodeMasks.from_config(config, positions=CachePositions(spatial_positions, positions))
    plan = masks.plan(torch.from_numpy(order[len(order) // 2 :][:1]))
    sizes = text_len + layout.frame_len, text_len + layout.num_slots
    if way != "layer":
        plan = plan.with_key_blocks(text_len, *sizes)
    plans = [of_channel for of_channel in (plan.spatial, plan.temporal_at(1)) if isinstance(of_channel, TablePlan)]
    listed = {id(of_channel.keys): of_channel.keys.num_blocks[0] for of_channel in plans if of_channel.keys is not None}

    def attend_listed(query: Tensor, key: Tensor, value: Tensor, text_bias: Tensor, keys: KeyBlocks) -> Tensor:
        num_keys = listed[id(keys)] * BLOCK_SIZE
        return attention(query, key[:, :, :num_keys], value[:, :, :num_keys])[0]

    stand_in = mock.patch.object(attention_module, "attend_key_blocks", attend_listed)
    with stand_in, FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        torch.set_default_dtype(torch.bfloat16)
        layer = TransformerLayer(config)
        caches = [
            ChannelKV(*(torch.zeros(batch, config.num_heads, size, config.head_dim) for _ in "kv"), text_len)
            for size in sizes
        ]
        bias = torch.zeros(batch, text_len, dtype=torch.float32)
        frames = torch.zeros(batch, 1, config.hidden_size)
        contexts = [ChannelContext(of_channel, bias, cache) for of_channel, cache in zip(plans, caches, strict=True)]
        run = layer if way == "layer" else DecodeLayer(layer)
        if way == "compiled":
            fusions = Fusions()
            compile_layer(DecodeLayer, fusions)(run, None, frames, *contexts)
            return fusions.counts[0]
        with Operations() as operations:
            run(None, frames, *contexts)
        return operations.count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("sequential", "interpolation"), help="default: both")
    parser.add_argument("--batch", type=int, default=4, help="clips per micro-batch")
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--heads", type=int, default=48)
    args = parser.parse_args()
    for name in ("batch", "hidden", "heads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}; expected at least 1")
    configs = {}
    for task in [args.task] if args.task else ["sequential", "interpolation"]:
        try:
            configs[task] = ModelConfig(
                task=task,
                num_layers=2,
                hidden_size=args.hidden,
                num_heads=args.heads,
                window_size=10 if task == "interpolation" else None,
                dropout=0.0,
                attention_dropout=0.0,
            )
        except ValueError as error:
            parser.error(str(error))
    print("| stage | way | forward: kernels | GB | backward: kernels | GB |")
    print("|---|---|---:|---:|---:|---:|")
    for task, config in configs.items():
        for way in ("blocks", "joined", "compiled"):
            forward, backward = count_layer(config, args.batch, config.text_len, way)
            print(f"| {task} | {way} | {forward} | {backward} |", flush=True)
    print("\n| stage | way | decoding step: kernels | GB |")
    print("|---|---|---:|---:|")
    for task, config in configs.items():
        for way in ("layer", "joint", "compiled"):
            print(f"| {task} | {way} | {count_step(config, config.text_len, way)} |", flush=True)


if __name__ == "__main__":
    main()
