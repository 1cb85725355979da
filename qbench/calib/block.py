"""One decoder block as algorithms see it: its layers, what they are to become, and what reaches them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qbench.calib.causal import forward_only
from qbench.calib.observers import Gram, Observer
from qbench.calib.stages import Stages
from qbench.calib.stream import Enough, Stream, called, for_batch, hidden_of
from qbench.models.attention import attention_spec, quantize_attention
from qbench.models.family import Family, Link, has_gain, in_expert
from qbench.models.hooks import quantized_inputs
from qbench.models.rotate import is_rotated_online
from qbench.models.surgery import migrate_scale
from qbench.quant.grid import QParams
from qbench.quant.mixed import choose_mixed
from qbench.quant.scheme import Scheme
from qbench.quant.spec import QuantSpec

_PAUSED_UP_TO = (
    2 << 30
)  # bytes of activations that `sequential` may hold between links; beyond, it runs again


def paused_bytes(n_tokens: int, hidden: int, widest: int, itemsize: int) -> int:
    """What all batches hold while each stands before the same layer of a block; 0 where that would be too much.

    Args:
        widest: Inputs of the block's widest layer.
    """
    n_bytes = n_tokens * (4 * hidden + widest) * itemsize
    return n_bytes if n_bytes <= _PAUSED_UP_TO else 0


@dataclass(frozen=True)
class Block:
    """One decoder block, its place in the model, and the activations that reach it.

    Attributes:
        inputs: What reaches the block; `None` where there is no calibration data.
        float_inputs, float_outputs: The same on the path of the floating-point model, and what the block made of
            it before any step touched it; only where an algorithm's `needs_float_path` is set.
        scheme: What `weight_spec` and `activation_spec` are read from.
        grids: By layer: the grid that a step has chosen for a rounder; a rounder chooses its own where there is none.
        kept: By layer: what stays in floating point, as a mask of input channels, `(in,)`, or of weights, `(out, in)`.
            Channels that are kept are kept in the layer's input too.
        group_bits: By layer: the bits of each group, `(n_groups,)`, in all rows; those of the scheme where there is none.
        stored_bits: By layer: bits of the whole layer as stored, where its scheme and `kept` do not tell.
        extra_bits: By name: what must be stored beside the model's own parameters (adapters, rotations).
        report: What a step has to tell of this block: losses, counts.
        n_blocks: Of the model.
        unseen: Layers of experts that no calibration token was routed to: to algorithms they are not there.
        missed: Layers of experts whose tokens went elsewhere once layers before them were rounded, with the version of the
            weight then; statistics leave them out.
    """

    index: int
    layer: nn.Module
    family: Family
    inputs: Stream | None
    kwargs: dict[str, Any]
    device: torch.device
    scheme: Scheme = field(default_factory=Scheme)
    float_inputs: Stream | None = None
    float_outputs: Stream | None = None
    grids: dict[str, QParams] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    group_bits: dict[str, Tensor] = field(default_factory=dict)
    stored_bits: dict[str, float] = field(default_factory=dict)
    extra_bits: dict[str, float] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    n_blocks: int = 1
    unseen: frozenset[str] = frozenset()
    missed: dict[str, int] = field(default_factory=dict)
    _left: dict[tuple[Any, ...], Stream] = field(default_factory=dict)
    _grams: dict[tuple[Any, ...], dict[Link, Tensor]] = field(default_factory=dict)

    @cached_property
    def links(self) -> tuple[Link, ...]:
        """The links as data flow, in forward order: each layer to quantize is a sink once."""
        return tuple(k for k in self.family.inputs(self.layer) if not self.unseen.issuperset(k.sinks))

    @cached_property
    def scalings(self) -> tuple[Link, ...]:
        """The links as scales move, in forward order: experts follow their norm together."""
        return tuple(k for k in self.family.scalings(self.layer) if not self.unseen.issuperset(k.sinks))

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """The layers to quantize, by name, in forward order."""
        return {name: self.linear(name) for link in self.links for name in link.sinks}

    @property
    def is_last(self) -> bool:
        """Whether no block comes after it, so that nobody reads all of its outputs."""
        return self.index + 1 == self.n_blocks

    def __getitem__(self, name: str) -> nn.Module:
        return self.layer.get_submodule(name)

    def linear(self, name: str) -> nn.Linear:
        module = self[name]
        assert isinstance(module, nn.Linear), f"{name} is a {type(module).__name__}"
        return module

    def sinks(self, link: Link) -> list[nn.Linear]:
        return [self.linear(name) for name in link.sinks]

    def weight_spec(self, name: str) -> QuantSpec | None:
        """The grid that the scheme has for a layer's weight; `None` leaves it in floating point."""
        return self.scheme.layer(self.index, name).weight

    def activation_spec(self, name: str) -> QuantSpec | None:
        """The grid that the scheme has for a layer's input."""
        return self.scheme.layer(self.index, name).activation

    def alike(self, link: Link) -> Iterator[tuple[QuantSpec, tuple[str, ...]]]:
        """The sinks of a link that are to be quantized: layers with one input and one grid are one tall weight.

        Layers that keep different channels are no such weight: theirs are rounded in different orders. Nor are those
        whose groups have different bits, or whose rows share scales, which layers do not.
        """
        groups: dict[tuple[QuantSpec, tuple[int, ...], tuple[int, ...], str], list[str]] = {}
        for name in link.sinks:
            if (spec := self.weight_spec(name)) is not None:
                channels, bits = self.kept_channels(name), self.group_bits.get(name)
                kept = () if channels is None else tuple(channels.nonzero().flatten().tolist())
                widths = () if bits is None else tuple(bits.tolist())
                groups.setdefault((spec, kept, widths, name if spec.spans_rows else ""), []).append(name)
        yield from ((spec, tuple(names)) for (spec, *_), names in groups.items())

    def chosen_grid(self, names: Sequence[str]) -> QParams | None:
        """The grids that a step has chosen for these layers, one below the other, `(out, n_groups, 1)` each.

        `None` where none was chosen for any; the min-max grid stands in for layers that a step has left out.
        """
        if not any(name in self.grids for name in names):
            return None
        grids = []
        for name in names:
            weight, spec = self.linear(name).weight, self.weight_spec(name)
            assert spec is not None, f"{name} has no grid"
            ranged = weight if (kept := self.kept.get(name)) is None else weight.masked_fill(kept, 0.0)
            bits = self.group_bits.get(name)
            grid = self.grids[name] if name in self.grids else choose_mixed(ranged, spec, bits)
            grids.append([part.expand(len(weight), -1, 1) for part in grid])
        return QParams(*(torch.cat(parts) for parts in zip(*grids, strict=True)))

    def kept_mask(self, names: Sequence[str]) -> Tensor | None:
        """What stays in floating point of these layers, one below the other, `(out, in)`; `None` if nothing does."""
        if not any(name in self.kept for name in names):
            return None
        masks = []
        for name in names:
            shape = self.linear(name).weight.shape
            kept = self.kept.get(name, torch.zeros(shape, dtype=torch.bool, device=self.device))
            masks.append(kept.expand(shape))
        return torch.cat(masks)

    def scalable(self, link: Link) -> bool:
        """Whether the link's source has one output channel per input channel of its sinks.

        It has not under grouped-query attention, where a value head feeds several output heads, nor without gains; nor
        does it where the input is rotated online, which mixes the channels.
        """
        sink = self.linear(link.sinks[0])
        if not has_gain(self.layer, link.source) or is_rotated_online(sink):
            return False
        rows = self.source_rows(link)
        n_outputs = len(self[str(link.source)].get_parameter("weight")) if rows is None else len(rows)
        return n_outputs == sink.in_features

    def is_norm(self, link: Link) -> bool:
        """Whether the link's source is a norm."""
        return link.source is not None and not isinstance(self[link.source], nn.Linear)

    def source_rows(self, link: Link) -> Tensor | None:
        """Which outputs of the link's source feed its sinks; `None` for all."""
        assert link.source is not None, "nothing produces the sinks' input"
        return self.family.source_rows(link, len(self[link.source].get_parameter("weight")))

    def followers(self, link: Link) -> list[nn.Module]:
        """Whatever reads what the link's source puts out: its sinks, and what stays in floating point."""
        return [self[name] for name in (*link.sinks, *link.also)]

    def migrate(self, link: Link, s: Tensor) -> None:
        """Divide a link's input by `s`, `(in,)`, and multiply its sinks' columns; Gram matrices that are known follow.

        Raises:
            ValueError: As `migrate_scale` does.
        """
        assert link.source is not None, "nothing produces the sinks' input"
        known = self._grams.pop(self._state(), {})
        migrate_scale(self[link.source], self.followers(link), s, self.source_rows(link))
        for other in known:
            if set(other.sinks) <= set(link.sinks):
                known[other] = known[other] / s / s[:, None]
        self._grams[self._state()] = known

    @contextmanager
    def quantized_activations(self) -> Iterator[None]:
        """Fake-quantize the layers' inputs, keys, values and products as the scheme has it while the context lasts.

        A layer input's range that is to come from calibration data is that of the batch meanwhile; keys and
        values with such a range are left alone.
        """
        specs = {name: self.activation_spec(name) for name in self.linears}
        wanted = {
            self.linear(n): (spec, self.kept_channels(n)) for n, spec in specs.items() if spec is not None
        }
        kv = self.scheme.kv if self.scheme.kv and self.scheme.kv.dynamic else None
        before = attention_spec(self.layer)
        with quantized_inputs(wanted):
            quantize_attention(self.layer, kv, self.scheme.bmm)
            try:
                yield
            finally:
                assert before is None, "attention was quantized before the layers"
                quantize_attention(self.layer, None, None)

    def kept_channels(self, name: str) -> Tensor | None:
        """The input channels of a layer that stay in floating point, `(in,)`; `None` if there are none."""
        kept = self.kept.get(name)
        return kept if kept is not None and kept.ndim == 1 else None

    def run(self, hidden: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
        """The block's output for one batch, with `parameters` in place of its own; differentiable."""
        kwargs = for_batch(self.kwargs, len(hidden))
        return hidden_of(functional_call(self.layer, parameters or {}, (hidden.to(self.device),), kwargs))

    def outputs(self, n_samples: int | None = None) -> Stream:
        """What leaves the block as it stands now, for all samples or for the first ones."""
        assert self.inputs is not None, "a data-free algorithm asked for activations"
        if (known := self._left.get(self._state())) is not None:
            return known if n_samples is None else known.head(n_samples)
        self._grams.clear()
        inputs = self.inputs if n_samples is None else self.inputs.head(n_samples)
        return inputs.through(self.layer, self.kwargs, self.device)

    def observe(
        self, *kinds: Callable[[], Observer], links: Sequence[Link] | None = None
    ) -> dict[Link, tuple[Tensor, ...]]:
        """Statistics, one of each kind, of the input that the sinks of a link share; one pass over the data.

        The pass stops, batch by batch, at the last layer that is observed. There is none where only Gram matrices
        are asked for and those of the last pass hold still: nothing has changed since but scales, by `migrate`.
        """
        assert self.inputs is not None, "a data-free algorithm asked for activations"
        links = self.links if links is None else links
        known = self._grams.get(self._state(), {})
        self._grams.clear()
        if kinds == (Gram,) and all(link in known for link in links):
            return {link: (known[link],) for link in links}
        observers = {link: tuple(make() for make in kinds) for link in links}
        waiting, met = set[Link](), set[Link]()

        def hook(link: Link) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def update(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                for observer in observers[link]:
                    observer.update(args[0])
                met.add(link)
                waiting.discard(link)
                if not waiting:
                    raise Enough

            return update

        with forward_only(), ExitStack() as stack:
            for link in links:
                place = self.linear(link.sinks[0]) if link.at is None else self[link.at]
                stack.callback(place.register_forward_pre_hook(hook(link)).remove)
            for batch in self.inputs.batches() if links else ():
                waiting.update(links)
                with suppress(Enough):
                    called(self.layer, batch.to(self.device), self.kwargs)
                if missed := [k.sinks[0] for k in waiting if not in_expert(k)]:
                    raise RuntimeError(f"block {self.index} never ran {', '.join(missed)}")
        unmet = [link for link in links if link not in met]
        self._note_missed(unmet)
        values = {link: tuple(o.value for o in observers[link]) for link in links if link in met}
        if Gram in kinds:
            self._grams[self._state()] = {link: v[kinds.index(Gram)] for link, v in values.items()}
        return values

    def sequential(self, *kinds: Callable[[], Observer]) -> Iterator[tuple[Link, tuple[Tensor, ...]]]:
        """Statistics of one link after another; what is done to a link is seen by the links behind it.

        It costs one forward pass: each batch pauses before the next link, with its activations in memory. Where
        these would be too many the block is run again for each link, with the same result.
        """
        assert self.inputs is not None, "a data-free algorithm asked for activations"
        n_samples, seq_len, hidden = self.inputs.hidden.shape
        widest = max(m.in_features for m in self.linears.values())
        if not paused_bytes(n_samples * seq_len, hidden, widest, self.inputs.hidden.element_size()):
            for link in self.links:
                yield from self.observe(*kinds, links=[link]).items()
            return

        def forward(batch: Tensor) -> Tensor:
            return called(self.layer, batch.to(self.device), self.kwargs).cpu()

        stages = Stages(forward, self.inputs.batches(), [self.linear(link.sinks[0]) for link in self.links])
        try:
            for link in self.links:
                observers, n_met = tuple(make() for make in kinds), 0
                for x in stages.until_next():
                    n_met += 1
                    for observer in observers:
                        observer.update(x)
                if n_met < len(self.inputs.batches()) and not in_expert(link):
                    raise RuntimeError(f"block {self.index} never ran {link.sinks[0]}")
                if not n_met:
                    self._note_missed([link])
                    continue
                yield link, tuple(o.value for o in observers)
            outputs = [] if self.is_last else stages.finish()
        finally:
            stages.close()
        if self.is_last:
            return
        self._left.clear()
        self._left[self._state()] = self.inputs.of(outputs)

    def _note_missed(self, links: Iterable[Link]) -> None:
        for name in (name for link in links for name in link.sinks):
            self.missed[name] = self.linear(name).weight._version

    def _state(self) -> tuple[Any, ...]:
        """What the block's function depends on: parameters by identity and version, and hooks."""
        parameters = tuple((id(p), p._version) for p in self.layer.parameters())
        hooks = tuple(key for m in self.layer.modules() for key in (*m._forward_pre_hooks, *m._forward_hooks))
        return parameters, hooks, attention_spec(self.layer)
