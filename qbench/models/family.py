"""Where things are in a decoder: the module names of described architectures are in `qbench.models.families`.

A `Link` states that a module's output feeds some linear layers and nothing else. It is what scale
migration (SmoothQuant, AWQ) acts upon, and its sinks share one input, hence one set of statistics.

Rotations (QuaRot, SpinQuant) act upon the residual stream: embeddings begin it, blocks read it through norms and
add to it, the head reads it through the final norm.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

Part = Literal["all", "values", "second half"]
Fused = Literal["apart", "stacked", "grouped", "latent"]
EVERY = "*"  # stands for the index of an expert


@dataclass(frozen=True)
class Link:
    """`source` (a norm or a linear layer) feeds `sinks`; names are relative to the block.

    Attributes:
        source: `None` where nothing that could absorb a scale produces the sinks' input.
        sinks: Linear layers, in forward order.
        part: The outputs of `source` that feed the sinks: all, the values of a fused projection, or the second half
            (up, behind gate).
        also: What else reads that output and stays in floating point (routers); it must follow when the source is scaled.
        at: The module whose input is the sinks' where each of them sees only some rows of it (experts).
    """

    source: str | None
    sinks: tuple[str, ...]
    part: Part = "all"
    also: tuple[str, ...] = ()
    at: str | None = None


@dataclass(frozen=True)
class Heads:
    """Attention's heads, and how projections are laid out.

    Attributes:
        queries, keys: How many heads of each; there are as many of values as of keys.
        size: Channels of a query and of a key.
        value_size: Channels of a value.
        fused: Queries, keys and values come from layers of their own (`apart`); from one, all queries, then all keys, then
            all values (`stacked`), or for each key head its queries, its key, its value (`grouped`); or keys and values
            come from one, for each head a part of its key, and its value (`latent`: DeepSeek's MLA).
    """

    queries: int
    keys: int
    size: int
    value_size: int
    fused: Fused = "apart"


@dataclass(frozen=True)
class Family:
    """Module names shared by the models of one architecture.

    Names of a block's modules may have `*` for the index of an expert; what a block lacks does not count, since blocks
    of one model may differ (dense ones and experts).

    Attributes:
        blocks: Dotted path of the decoder blocks from the model's root.
        links: The block's links in forward order; their sinks are the layers to quantize.
        norms: Of the block: those that read the residual stream; what they feed reads it.
        query_key: The linear layers whose outputs meet in a product; clipping leaves them alone.
        value: The linear layer whose output attention averages, head by head; `None` without attention.
        attention_out: The layer that adds attention's output to the residual stream, or what a state space makes.
        mlp_out: The layers that add the MLP's.
        embeddings: Paths, from the model's root, of the embeddings whose sum enters the first block.
        final_norm: Path of the norm between the last block and the head; `None` where there is none, or where the
            residual stream cannot be rotated (projections, norms that are part of it).
        head: Path of the layer that makes the logits.
        rotary: Queries and keys are turned by a rotary embedding in pairs of channels half a head apart (`halves`), in
            another way (`other`), or not at all.
        kept: Layers of a block that stay in floating point, and why.
        attention: Whether transformers' registry runs it, it has arithmetic of its own, or there is none.
        returns_tuple: Blocks return a tuple that begins with the hidden states.
        heads: Filled in from the config by `family_of`.
        discovered: Found in the module tree, by `qbench.models.discover`, rather than described.
    """

    blocks: str
    links: tuple[Link, ...]
    norms: tuple[str, ...]
    query_key: tuple[str, ...]
    value: str | None
    attention_out: str | None
    mlp_out: tuple[str, ...]
    embeddings: tuple[str, ...]
    final_norm: str | None
    head: str = "lm_head"
    rotary: Literal["halves", "other", "none"] = "halves"
    kept: tuple[tuple[str, str], ...] = ()
    attention: Literal["registry", "own", "none"] = "registry"
    returns_tuple: bool = False
    heads: Heads | None = None
    discovered: bool = False

    def scalings(self, block: nn.Module) -> tuple[Link, ...]:
        """The links of a block as scales move: all that reads the source's output follows, experts together."""
        present = {name for name, _ in block.named_modules()}
        return tuple(found for link in self.links for found in _resolved(link, present))

    def inputs(self, block: nn.Module) -> tuple[Link, ...]:
        """The links of a block as data flow: sinks see the same rows, each layer to quantize is a sink once.

        In forward order, which is that of the experts' numbers.
        """
        exact = [part for link in self.scalings(block) for part in _by_rows(link)]
        place: dict[str, int] = {}
        for link in exact:
            place.setdefault(_parent(link.sinks[0]), len(place))
        return tuple(sorted(exact, key=lambda link: place[_parent(link.sinks[0])]))

    def linears(self, block: nn.Module) -> tuple[str, ...]:
        """The layers of a block to quantize, in forward order."""
        return tuple(name for link in self.inputs(block) for name in link.sinks)

    def writers(self, block: nn.Module) -> tuple[str, ...]:
        """The layers of a block whose outputs are added to the residual stream."""
        patterns = ([self.attention_out] if self.attention_out else []) + list(self.mlp_out)
        return tuple(expanded(patterns, {name for name, _ in block.named_modules()}))

    def readers(self, block: nn.Module) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """The norms of a block that read the residual stream, each with the layers behind it, routers included."""
        links = [link for link in self.scalings(block) if link.source in self.norms]
        return tuple((str(link.source), link.sinks + link.also) for link in links)

    def norm_links(self, block: nn.Module) -> tuple[Link, ...]:
        """The links of a block whose source is a norm with gains, which any scale can go into."""
        gained = [link for link in self.scalings(block) if has_gain(block, link.source)]
        return tuple(k for k in gained if not isinstance(block.get_submodule(str(k.source)), nn.Linear))

    def skipped(self, block: nn.Module) -> dict[str, str]:
        """What has weights in a block and stays in floating point, with the reason."""
        linears, known = set(self.linears(block)), dict(self.kept)
        reasons = {}
        for name, module in block.named_modules():
            if name in linears or getattr(module, "weight", None) is None or module.weight.ndim < 2:
                continue
            reasons[name] = known.get(pattern_of(name), f"a {type(module).__name__}, no linear layer")
        return reasons

    def source_rows(self, link: Link, n_outputs: int) -> Tensor | None:
        """Which outputs of a link's source feed the sinks, ascending; `None` for all."""
        if link.part == "second half":
            return torch.arange(n_outputs // 2, n_outputs)
        return self.value_rows(n_outputs) if link.part == "values" else None

    def value_rows(self, n_outputs: int) -> Tensor | None:
        """Which outputs of the layer `value` are values, head by head; `None` for all."""
        heads = self.heads
        assert heads is not None, "family_of fills in the heads"
        if heads.fused == "apart":
            return None
        rows = torch.arange(n_outputs)
        if heads.fused == "stacked":
            return rows[-heads.keys * heads.value_size :]
        return rows.view(heads.keys, -1)[:, -heads.value_size :].flatten()


def pattern_of(name: str) -> str:
    """A name with `*` for the index of an expert."""
    return re.sub(r"\.\d+\.", f".{EVERY}.", name)


def expanded(patterns: Iterable[str], present: Iterable[str]) -> Iterator[str]:
    """The names that are present, `*` standing for any number, ascending."""
    names = set(present)
    for pattern in patterns:
        if EVERY not in pattern:
            yield from (pattern,) if pattern in names else ()
            continue
        fits = re.compile(re.escape(pattern).replace(r"\*", r"(\d+)"))
        found = [(int(hit[1]), name) for name in names if (hit := fits.fullmatch(name))]
        yield from (name for _, name in sorted(found))


def _resolved(link: Link, present: set[str]) -> Iterator[Link]:
    """A link with the names that a block has: one for each expert if its source is in one."""
    if link.source is not None and EVERY in link.source:
        for source in expanded((link.source,), present):
            index = _number(source)
            sinks = tuple(name.replace(EVERY, index) for name in link.sinks)
            yield replace(link, source=source, sinks=sinks)
        return
    sinks = tuple(expanded(link.sinks, present))
    if not sinks:
        return
    at = link.at if any(EVERY in name for name in link.sinks) and _has_experts(sinks) else None
    also = tuple(expanded(link.also, present))
    yield replace(link, source=link.source if link.source in present else None, sinks=sinks, also=also, at=at)


def _by_rows(link: Link) -> Iterator[Link]:
    if link.at is None:
        yield link
        return
    units: dict[str, list[str]] = {}
    for name in link.sinks:
        units.setdefault(_parent(name), []).append(name)
    yield from (Link(None, tuple(names)) for names in units.values())


def has_gain(block: nn.Module, source: str | None) -> bool:
    """Whether a link's source has a weight that a scale can go into; some norms have none."""
    return source is not None and getattr(block.get_submodule(source), "weight", None) is not None


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _number(name: str) -> str:
    return next(part for part in name.split(".") if part.isdigit())


def _has_experts(names: Iterable[str]) -> bool:
    return any(part.isdigit() for name in names for part in name.split("."))


def in_expert(link: Link) -> bool:
    """Whether a batch of tokens may pass a link by: none may be routed to its expert."""
    return link.at is None and _has_experts(link.sinks)


def family_of(model: nn.Module) -> Family:
    """The family of a Hugging Face causal language model (a skeleton will do): described, or discovered.

    Of a skeleton only the layers are discovered; their links take weights to be checked.

    Raises:
        NotImplementedError: If no decoder blocks are found, or none of their layers can be quantized.
    """
    from qbench.models.discover import discovered
    from qbench.models.families import described

    found = described(model.config)
    return discovered(model) if found is None else found
