"""The family of an architecture that nobody has described: found in the module tree, and checked by running a block.

What shares an input is seen by running a block of each kind on a few tokens. What feeds it is guessed from shapes and
then tried: the source is scaled, channel by channel, by powers of two, its sinks by the inverse, and the output of the
block must not change. What holds for no source is left without one: rounding needs none.

Of a skeleton only the layers are found. Rotations need to know the whole residual stream, and are left to families
that are described.
"""

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qbench.models.disk import at_hand
from qbench.models.experts import experts_in
from qbench.models.families import heads_of
from qbench.models.family import EVERY, Family, Heads, Link, pattern_of
from qbench.models.surgery import scale_columns, scale_rows
from qbench.models.traced import Call, Trace, first_call, in_double, traced

_KEPT = "_qbench_family"  # on the model, so that its copies know it too, whatever was done to them
_SAME = 1e-3  # of what half of the edit does; powers of two cost no digits
_MANY = ("num_experts", "num_local_experts", "n_routed_experts")


def discovered(model: Any) -> Family:
    """The family of a model that is not described.

    Raises:
        NotImplementedError: If there are no decoder blocks, or no layers in them.
    """
    if (known := model.__dict__.get(_KEPT)) is None:
        known = model.__dict__[_KEPT] = discover(model)
    return known  # type: ignore[no-any-return]


def discover(model: Any) -> Family:
    """Find the family of a model, described or not; see `discovered`."""
    path, blocks = _blocks(model)
    names = {module: name for name, module in model.named_modules()}
    plain = Family(
        blocks=path, links=(), norms=(), query_key=(), value=None, attention_out=None, mlp_out=(), final_norm=None,
        embeddings=(names[model.get_input_embeddings()],), head=names.get(model.get_output_embeddings(), "lm_head"),
        rotary="other", attention="none", discovered=True,
    )  # fmt: skip
    kinds: dict[str, int] = {}
    for index, block in enumerate(blocks):
        kinds.setdefault(str(block), index)  # a module's text tells its layers and their sizes
    family = plain
    if next(model.parameters()).is_meta:
        linears = [pattern_of(name) for i in kinds.values() for name in _linears(blocks[i], model.config)]
        family = replace(plain, links=tuple(Link(None, (name,)) for name in dict.fromkeys(linears)))
    else:
        call = first_call(model, path)
        for index in kinds.values():
            with at_hand(model, path, index) as block:
                family = _joined(family, _Looking(model, block, call, plain).found())
    if not family.links:
        raise NotImplementedError(f"no linear layers were found in {path} of {type(model).__name__}")
    kept = [item for i in kinds.values() for item in _kept(blocks[i], family)]
    return replace(family, kept=tuple(dict.fromkeys(kept)))


def _blocks(model: Any) -> tuple[str, nn.ModuleList]:
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise NotImplementedError(
            f"model_type {model.config.model_type!r} is not described, and {type(model).__name__} has no list of decoder "
            "blocks to be found; add a Family to qbench/models/families.py"
        )
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _linears(block: nn.Module, config: Any) -> list[str]:
    """The linear layers of a block, but for those that weigh or choose experts."""
    few = {1, *(getattr(config, name, None) for name in _MANY)}
    modules = [(name, m) for name, m in block.named_modules() if isinstance(m, nn.Linear)]
    return [name for name, module in modules if module.out_features not in few]


def _kept(block: nn.Module, family: Family) -> Iterator[tuple[str, str]]:
    quantized = set(family.linears(block))
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) and name not in quantized:
            few = module.out_features == 1 or "gate" in name or "router" in name
            yield pattern_of(name), "chooses or weighs experts" if few else "the layer was never called"


def _joined(a: Family, b: Family) -> Family:
    """What two kinds of blocks tell together; where they differ about a link it has no source."""
    links = {link.sinks: link for link in a.links}
    for link in b.links:
        known = links.get(link.sinks, link)
        links[link.sinks] = link if known == link else Link(None, link.sinks, at=link.at)
    return replace(
        b, links=tuple(links.values()), norms=tuple(dict.fromkeys((*a.norms, *b.norms))),
        query_key=tuple(dict.fromkeys((*a.query_key, *b.query_key))), value=a.value or b.value,
        attention_out=a.attention_out or b.attention_out, heads=a.heads or b.heads,
        attention=b.attention if a.attention == "none" else a.attention,
    )  # fmt: skip


@dataclass
class _Looking:
    """A block that is looked into.

    Attributes:
        plain: The family as far as the blocks have no part in it.
    """

    model: Any
    block: nn.Module
    call: Call
    plain: Family

    def __post_init__(self) -> None:
        # In half precision a gain that is kept less one cannot be scaled exactly.
        self.block = copy.deepcopy(self.block).double()
        self.call = in_double(self.call)
        self.trace: Trace = traced(self.block, self.call)

    def found(self) -> Family:
        inside = {f"{path}." for path in experts_in(self.block)}
        outside = {
            n
            for n in _linears(self.block, self.model.config)
            if not any(n.startswith(path) for path in inside)
        }
        links = [self._link(sinks) for sinks in self.trace.sharing(outside)]
        for path in experts_in(self.block):
            together, inner = self._of_experts(path, outside)
            shared = [i for i, k in enumerate(links) if set(k.sinks) <= set(together.sinks)]
            place = min(shared, default=len(links))
            rest = [k for i, k in enumerate(links) if i not in shared]
            links = [*rest[:place], together, inner, *rest[place:]]
        family = replace(self.plain, returns_tuple=self.trace.returns_tuple, links=tuple(links))
        norms = [k.source for k in links if k.source and not isinstance(self._module(k.source), nn.Linear)]
        return self._with_attention(replace(family, norms=tuple(norms)))

    def _of_experts(self, path: str, outside: set[str]) -> tuple[Link, Link]:
        """The link of the experts with what shares their input, and that inside each."""
        gate, up, down = (f"{path}.{EVERY}.{part}_proj" for part in ("gate", "up", "down"))
        own = tuple(n for n, _ in self.block.named_modules() if pattern_of(n) in (gate, up))
        link = self._link(own, at=path)
        order = list(self.trace.entered)
        shared = [name for name in link.also if name in outside]
        first = [name for name in shared if order.index(name) < order.index(path)]
        last = [name for name in shared if name not in first]
        also = tuple(name for name in link.also if name not in shared)
        return replace(link, sinks=(*first, gate, up, *last), also=also), Link(up, (down,))

    def _module(self, name: str) -> Any:
        return self.block.get_submodule(name.replace(EVERY, "0"))

    def _link(self, sinks: tuple[str, ...], at: str | None = None) -> Link:
        """The link with these sinks, and the first source from which scales can be moved."""
        place, width = at or sinks[0], self._module(sinks[0]).in_features
        others = [n for n in self.trace.readers(place) if n not in sinks and self._reads(n, width)]
        for maker in self.trace.makers(place):
            link = Link(maker, sinks, "all", tuple(others), at)
            if getattr(self._module(maker), "weight", None) is not None and self._holds(link):
                return link
        for name in reversed(self.trace.before(place) if at is None else []):
            module = self._module(name)
            if (
                isinstance(module, nn.Linear)
                and name not in sinks
                and module.out_features in (width, 2 * width)
            ):
                link = Link(name, sinks, "all" if module.out_features == width else "second half")
                if self._holds(link):
                    return link
        return Link(None, sinks, at=at)

    def _reads(self, name: str, width: int) -> bool:
        """Whether a module has a weight with a column for each channel of its input."""
        weight = dict(self._module(name).named_parameters(recurse=False)).get("weight")
        return weight is not None and weight.ndim == 2 and weight.shape[1] == width

    def _with_attention(self, family: Family) -> Family:
        """With the layer that attention averages, the one behind it, and those whose outputs meet in a product."""
        try:
            heads = heads_of(self.model.config)
        except AttributeError:  # no heads, hence no attention
            return family
        for link in family.links:
            scope, _, _ = link.sinks[0].rpartition(".")
            if len(link.sinks) > 1 or "att" not in scope.lower():
                continue
            for source, trial in self._values(scope, link.sinks[0], heads):
                rows = replace(family, heads=trial).value_rows(self._module(source).out_features)
                if not self._holds(Link(source, link.sinks), rows, heads.queries // heads.keys):
                    continue
                linked = replace(link, source=source, part="all" if rows is None else "values")
                links = tuple(linked if k is link else k for k in family.links)
                beside = [
                    n for k in links for n in k.sinks if n.startswith(f"{scope}.") and n != link.sinks[0]
                ]
                products = tuple(n for n in beside if n != source) or (source,)
                registry = hasattr(sys.modules[type(self.model).__module__], "ALL_ATTENTION_FUNCTIONS")
                return replace(
                    family, links=links, value=source, attention_out=link.sinks[0], query_key=products, heads=trial,
                    attention="registry" if registry else "own",
                )  # fmt: skip
        return family

    def _values(self, scope: str, out: str, heads: Heads) -> Iterator[tuple[str, Heads]]:
        """The layers beside `out` that may make values, with how they would be laid out."""
        one = heads.keys * heads.value_size
        for name in self.trace.before(out):
            module = self._module(name)
            if not isinstance(module, nn.Linear) or not name.startswith(f"{scope}."):
                continue
            if heads.fused == "latent":
                yield from ((name, heads),) if module.out_features % heads.keys == 0 else ()
            elif module.out_features == one:
                yield name, heads
            elif module.out_features == heads.queries * heads.size + 2 * one:
                yield name, replace(heads, fused="stacked")
                yield name, replace(heads, fused="grouped")

    def _holds(self, link: Link, rows: Tensor | None = None, repeats: int = 1) -> bool:
        """Whether scales can be moved along a link.

        Args:
            rows: The outputs of the source that feed the sinks, if not those that `link.part` says.
            repeats: How many heads read one head of values.
        """
        trial = copy.deepcopy(self.block)
        source: Any = trial.get_submodule(str(link.source))
        n = len(source.weight)
        rows = torch.arange(n // 2, n) if link.part == "second half" else rows
        size = n if rows is None else len(rows)
        s = torch.tensor([0.5, 2.0, 4.0, 1.0]).repeat(-(-size // 4))[:size]
        if repeats > 1:
            heads = heads_of(self.model.config)
            s = s[: heads.value_size].repeat(heads.keys)
        width = trial.get_submodule(link.sinks[0]).get_parameter("weight").shape[1]
        if len(s) * repeats != width or (rows is not None and len(rows) != size):
            return False
        try:
            scale_rows(source, 1 / s, rows)
        except NotImplementedError:  # no norm that is understood
            return False
        wide = s if repeats == 1 else s[: heads.value_size].repeat(heads.queries)
        for name in (*link.sinks, *link.also):
            scale_columns(trial.get_submodule(name), wide)
        whole = traced(trial, self.call).output
        scale_rows(source, s, rows)
        half = traced(trial, self.call).output
        # Not against the output itself: next to a channel of the residual stream that is large, all else looks equal.
        effect = (half - self.trace.output).abs().max()
        return bool(effect > 0 and (whole - self.trace.output).abs().max() <= _SAME * effect)
