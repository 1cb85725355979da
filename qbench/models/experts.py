"""Mixture-of-experts and transposed layers as plain `nn.Linear`s: what quantizes those works on all of them.

transformers 5 keeps the experts of a block as two 3-D parameters, and GPT-2 its layers as `Conv1D`, with transposed
weights. `unpack` replaces both. What a fused module computes is read off its shapes and then checked by running it,
not looked up by class.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from qbench.errors import first_line

# Of 3-D parameters; a module with one of them is a fused one, understood or not.
_FUSED = {"gate_up_proj", "gate_proj", "up_proj", "down_proj"}
# The probe is in float64: a detour through float32 (1e-7) is told from another order of summation (1e-15).
_PROBE_TOLERANCE = 1e-10


class Expert(nn.Module):
    """A gated MLP: `down(act(gate(x)) * up(x))`; its layers are made without storage."""

    def __init__(self, hidden: int, intermediate: int, act_fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False, device="meta")
        self.up_proj = nn.Linear(hidden, intermediate, bias=False, device="meta")
        self.down_proj = nn.Linear(intermediate, hidden, bias=False, device="meta")
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """The routed experts of a block, children `0`, `1`, ...; called as the fused module that it replaces.

    Experts run in ascending order, `gate_proj` before `up_proj` before `down_proj`, each once per pass and only
    when a token was routed to it.

    Attributes:
        all_tokens: Call every expert with every token; see `all_experts`.
    """

    def __init__(self, n: int, hidden: int, intermediate: int, act_fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.all_tokens = False
        for index in range(n):
            self.add_module(str(index), Expert(hidden, intermediate, act_fn))

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Expert]:
        return iter(self._modules.values())

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of the experts' outputs by their weights, `(tokens, hidden)`.

        Args:
            hidden_states: `(tokens, hidden)`.
            top_k_index: The experts of each token, `(tokens, k)`; the number of experts stands for none.
            top_k_weights: Of each of them, `(tokens, k)`.

        Raises:
            ValueError: If an index is not of an expert.
        """
        hit = set(top_k_index.unique().tolist())
        if wrong := hit - set(range(len(self) + 1)):
            raise ValueError(
                f"tokens are routed to experts {sorted(wrong)}; there are {len(self)}, of index 0 and up"
            )
        total = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            if index not in hit and not self.all_tokens:
                continue
            token, slot = torch.where(top_k_index == index)
            out = expert(hidden_states)[token] if self.all_tokens else expert(hidden_states[token])
            weighted = out * top_k_weights[token, slot, None]
            total.index_add_(0, token, weighted.to(total.dtype))
        return total


def experts_in(layer: nn.Module) -> dict[str, Experts]:
    """Unpacked experts by their path in `layer`."""
    return {path: module for path, module in layer.named_modules() if isinstance(module, Experts)}


@contextmanager
def counted(layer: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Count the tokens routed to each expert while the context lasts.

    Yields:
        By path of the experts in `layer`: int64, `(n_experts,)`, on the CPU, growing with every pass. The router's
        choices are counted, padding included, whatever `all_experts` makes the experts see besides.
    """
    counts: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for path, experts in experts_in(layer).items():
            counts[path] = torch.zeros(len(experts), dtype=torch.int64)
            hook = _counter(counts[path])
            stack.callback(experts.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield counts


def _counter(counts: Tensor) -> Callable[..., None]:
    def count(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        chosen = top_k_index.flatten().cpu()
        counts.add_(chosen.bincount(minlength=len(counts) + 1)[: len(counts)])

    return lambda _, args, kwargs: count(*args, **kwargs)


@contextmanager
def all_experts(layer: nn.Module) -> Iterator[None]:
    """Call every expert with every token while the context lasts; the output stays what routing gives.

    A token's output of an expert that it is not routed to is left out, not weighted by zero: it may be infinite in
    half precision. Where the products of a matrix depend on how many rows it is multiplied by, as in BLAS, the
    output is that of routing to rounding, not to the bit; so it is under hooks that quantize all tokens on one grid.
    """
    with ExitStack() as stack:
        for experts in experts_in(layer).values():
            stack.callback(setattr, experts, "all_tokens", experts.all_tokens)
            experts.all_tokens = True
        yield


def unpack(model: nn.Module) -> None:
    """Replace fused experts by `Experts`, and `Conv1D` by `nn.Linear`, in place.

    Works on the `meta` device too. Weights are copied, one block's experts at a time, so that each owns its memory;
    a fused parameter is dropped as soon as it was copied. Nothing was changed where this raises.

    Raises:
        NotImplementedError: If fused experts are not understood.
        ValueError: If a module to be replaced carries hooks, or is `model` itself.
    """
    from transformers.pytorch_utils import Conv1D

    modules = model.named_modules(remove_duplicate=False)
    found = {path: module for path, module in modules if isinstance(module, Conv1D) or _is_fused(module)}
    for path, module in found.items():
        _check_replaceable(path, module)
        problem = None if isinstance(module, Conv1D) else _structure_problem(module) or _probe_problem(module)
        if problem:
            raise NotImplementedError(
                f"{path} ({type(module).__name__}) has fused experts that are not understood: {problem}; needed are "
                "gate_up_proj (experts, 2 x intermediate, hidden) and down_proj (experts, hidden, intermediate) "
                "alone, for down(act_fn(gate(x)) * up(x))"
            )
    made: dict[nn.Module, nn.Module] = {}
    for path, module in found.items():
        if module not in made:
            made[module] = _transposed(module) if isinstance(module, Conv1D) else _split(module)
        model.set_submodule(path, made[module])


def _is_fused(module: nn.Module) -> bool:
    return any(p.ndim == 3 and name in _FUSED for name, p in module.named_parameters(recurse=False))


def _transposed(conv1d: nn.Module) -> nn.Linear:
    weight = conv1d.get_parameter("weight")
    linear = nn.Linear(*weight.shape, device="meta")
    linear.weight = nn.Parameter(weight.detach().T.contiguous(), weight.requires_grad)
    linear.bias = conv1d.get_parameter("bias")
    del conv1d.weight
    return linear.train(conv1d.training)


def _split(fused: nn.Module) -> Experts:
    """The experts of a fused module, which loses its parameters."""
    n_experts, hidden, intermediate = fused.get_parameter("down_proj").shape
    experts = Experts(n_experts, hidden, intermediate, fused.act_fn)
    halves = {"gate_proj": slice(0, intermediate), "up_proj": slice(intermediate, None)}
    for name, parts in (("gate_up_proj", halves), ("down_proj", {"down_proj": slice(None)})):
        parameter = fused.get_parameter(name)
        for index, expert in enumerate(experts):
            for layer, rows in parts.items():
                # A view would keep all experts in memory, and in what is pickled, while one of them lives.
                part = parameter.detach()[index, rows].clone(memory_format=torch.contiguous_format)
                expert.get_submodule(layer).weight = nn.Parameter(part, parameter.requires_grad)
        delattr(fused, name)
    return experts.train(fused.training)


def _check_replaceable(path: str, module: nn.Module) -> None:
    kind = type(module).__name__
    if not path:
        raise ValueError(f"{kind} itself is to be replaced, which needs its parent; unpack what it is in")
    # accelerate puts its own forward into the instance.
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        raise ValueError(
            f"{path} ({kind}) has hooks, which would be lost; unpack before dispatching or hooking"
        )


def _structure_problem(fused: nn.Module) -> str | None:
    shapes = {name: tuple(tensor.shape) for name, tensor in fused.state_dict().items()}
    if set(shapes) != {"gate_up_proj", "down_proj"}:
        return f"it holds {', '.join(sorted(shapes))}"
    n_experts, hidden, intermediate = shapes["down_proj"] if len(shapes["down_proj"]) == 3 else (0, 0, 0)
    if shapes["gate_up_proj"] != (n_experts, 2 * intermediate, hidden):
        return " and ".join(f"{name} is {shape}" for name, shape in shapes.items())
    if lacking := {"num_experts", "act_fn"} - set(dir(fused)):
        return f"it has no {' and no '.join(sorted(lacking))}"
    if fused.num_experts != n_experts:
        return f"num_experts is {fused.num_experts}, of which {n_experts} have weights"
    return None


@torch.no_grad()
def _probe_problem(fused: nn.Module) -> str | None:
    """Compare with the replacement on two tiny experts, whatever the module's own size and device.

    Tokens range over six orders of magnitude, so that a clamped activation shows.
    """
    n_experts, hidden, intermediate, n_tokens = 2, 4, 3, 32
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probe = copy.copy(fused)
    probe.num_experts = n_experts
    probe._parameters = {
        "gate_up_proj": nn.Parameter(draw(n_experts, 2 * intermediate, hidden)),
        "down_proj": nn.Parameter(draw(n_experts, hidden, intermediate)),
    }
    magnitude = torch.logspace(-2, 4, n_tokens, dtype=torch.float64)[:, None]
    inputs = {
        "hidden_states": draw(n_tokens, hidden) * magnitude,
        "top_k_index": torch.tensor([[0, 1], [1, 0]]).repeat(n_tokens // 2, 1),
        "top_k_weights": draw(n_tokens, n_experts).abs(),
    }
    # The loop that the class itself writes: a faster one may be chosen by its config, and not know float64.
    forward = inspect.unwrap(type(fused).forward)
    try:
        expected = forward(probe, **inputs)
        actual = _split(probe)(**inputs)
    except Exception as error:
        return f"a call with {', '.join(inputs)} raises {first_line(error)}"
    difference = ((actual - expected).abs().amax(1) / expected.abs().amax(1)).max()
    if not difference < _PROBE_TOLERANCE:
        return f"on random tokens its output is another, by {difference:.1e} of its size"
    return None
