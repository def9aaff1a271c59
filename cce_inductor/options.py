"""What a user can set, in one place: `torch.compile(model, backend="cce", options={...})`, `enable(...)`."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .compat import inductor_option_names

Logits = Literal["lazy", "materialize", "refuse"]
OnRefusal = Literal["log", "warn", "raise"]


@dataclass(frozen=True)
class Options:
    """The options of the package. They may be mixed with Inductor's own, which are handed on to it.

    mode: Inductor's mode ("default", "reduce-overhead", "max-autotune", ...). The same as `torch.compile(mode=...)`,
        which takes no options beside it.
    min_vocab: the fewest classes worth rewriting. With fewer the logits are small and the plain loss is as fast.
        0 rewrites every head.
    min_logits_bytes: the least memory, in bytes, that the logits would have to take, in the dtype that enters the
        loss. 0 rewrites every problem.
    min_flops: the fewest floating-point operations of the logits, 2 N V D, worth rewriting on a GPU in 16 bits. Below,
        or with fewer than 2048 rows, torch.compile's loss is faster. 0 rewrites every problem.
    workspace_mib: scratch memory of the backward in MiB. More makes it faster up to a point. None is 256, or on a GPU,
        where gradients are computed with the loss, as much as keeps the peak below half of torch.compile's if that is
        more, but at most 1280 where they may be approximate. ARCHITECTURE.md has the formula of the peak.
    approximate_mass: how much of each row's probability mass the backward may approximate, from 0 (exact gradients)
        to below 1. In bfloat16 and float16 on a GPU, and in bfloat16 on a CPU where the loss is the only one of its
        graph, it then skips the tiles of the softmax that matter least and puts their mass back as rows spread it on
        average: on a GPU those of which at most 1/45 of this (1/1450 in float16, whose own rounding does less harm) is
        left without two tokens, the target among them, that are computed alone; on a CPU half of this is for tiles that
        have at most 1/256 of it. Faster the more peaked the softmax is. Elsewhere gradients are always exact.
    logits: what becomes of logits that a program returns beside the loss. "lazy": they are computed from the hidden
        states when something first reads them, which must be before the weight changes. "materialize": they are
        computed with the loss, which is rewritten all the same. "refuse": such a loss is left as it is.
    on_refusal: what to do where a loss is found and can't be rewritten: "log" it, "warn" as well, or "raise"
        `RefusedError`. What is merely too small, or returns logits where no gradients are recorded, is only logged.
    verify: how many calls of each compiled program run Inductor's version too, compare results and gradients, and raise
        `VerificationError` where they disagree by more than rounding. True is 2; 0 and False are none.
    """

    mode: str | None = None
    min_vocab: int = 4096
    min_logits_bytes: int = 16 << 20
    min_flops: int = 10**12
    workspace_mib: int | None = None
    on_refusal: OnRefusal = "log"
    logits: Logits = "lazy"
    approximate_mass: float = 2.0**-4
    verify: int = 0

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError, naming the option, for a value that can't be used."""
        if not (self.mode is None or isinstance(self.mode, str)):
            raise TypeError(f"option mode must be a string or None, got {self.mode!r}")
        if isinstance(self.verify, bool):
            object.__setattr__(self, "verify", 2 if self.verify else 0)
        leasts = {"min_vocab": 0, "min_logits_bytes": 0, "min_flops": 0, "workspace_mib": 1, "verify": 0}
        for name, least in leasts.items():
            value = getattr(self, name)
            if value is None and name == "workspace_mib":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"option {name} must be an int, got {value!r}")
            if value < least:
                raise ValueError(f"option {name} must be at least {least}, got {value}")
        if isinstance(self.approximate_mass, bool) or not isinstance(self.approximate_mass, int | float):
            raise TypeError(f"option approximate_mass must be a number, got {self.approximate_mass!r}")
        if not 0 <= self.approximate_mass < 1:
            raise ValueError(f"option approximate_mass must be in [0, 1), got {self.approximate_mass}")
        for name, allowed in (("on_refusal", get_args(OnRefusal)), ("logits", get_args(Logits))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"option {name} must be one of {allowed}, got {getattr(self, name)!r}")

    @classmethod
    def split(cls, options: dict[str, Any] | None) -> tuple["Options", dict[str, Any]]:
        """(ours, Inductor's) from one dictionary; ValueError for a name that neither knows."""
        names = {field.name: field.default for field in dataclasses.fields(cls)}
        ours, inductors = {}, {}
        for name, value in (options or {}).items():
            if name in names:
                ours[name] = value
            elif name.replace("-", "_") in inductor_option_names():
                inductors[name] = value
            else:
                known = ", ".join(f"{name}={default!r}" for name, default in names.items())
                raise ValueError(
                    f"unknown option {name!r}: cce_inductor has {known}; every option of torch.compile's Inductor "
                    "backend is valid too (torch._inductor.list_options())"
                )
        return cls(**ours), inductors
