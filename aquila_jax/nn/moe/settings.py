"""How a mixture computes, which is not part of what it is."""

import dataclasses

from aquila_jax.errors import UserError

_CHOICES = {
    "strategy": ("dropless", "capacity", "reference"),
    "exchange": ("auto", "all_to_all", "gather"),
    "balance": ("global", "device", "sequence"),
}
_NUMBERS = ("capacity_factor", "buffer_factor", "jitter")


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """How a mixture's tokens reach their experts, and how its router is charged.

    `dropless` and `reference` give equal outputs and gradients, and so does `capacity` where
    nothing is dropped. Not architecture: a checkpoint may be continued with any.

    Attributes:
        strategy: "dropless" (rows sorted by expert, grouped matrix products), "capacity" (a fixed
            number of slots for every expert; what finds none is dropped) or "reference" (every
            expert on every token; E / k times the arithmetic, and nothing to go wrong).
        exchange: between devices that hold different experts: "all_to_all" sends every row to its
            expert's device, "gather" sends all tokens to all of them and sums what comes back;
            "auto" takes what moves fewer bytes (`aquila_jax.nn.moe.traffic`).
        capacity_factor: of "capacity": slots of an expert for the tokens of one device, as a
            multiple of what it gets when all get the same.
        overflow: of "capacity": whether a token that found an expert full tries its next best one
            beyond its k.
        buffer_factor: of "dropless" with experts on several devices: rows a device makes room
            for at once, as a multiple of the average. Where one gets more, all go through another
            round, which gathers the experts' weights once more; nothing is dropped. The backward
            pass then computes a round again rather than keep it. 0 makes room for all that can
            come, which is one round whatever happens.
        balance: over what the load-balancing loss asks for balance: the whole batch ("global"),
            the rows of one device ("device"), or every row ("sequence").
        jitter: while training, the router sees every input times a number drawn from
            1 - jitter ... 1 + jitter (Switch, arXiv 2101.03961); 0 is none.

    Raises:
        UserError: a setting is not one of its choices, or out of its range.
    """

    strategy: str = "dropless"
    exchange: str = "auto"
    capacity_factor: float = 1.25
    overflow: bool = False
    buffer_factor: float = 1.5
    balance: str = "global"
    jitter: float = 0.0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(
                    f"Dispatch.{name} must be one of {', '.join(choices)}, "
                    f"not {getattr(self, name)!r}"
                )
        for name in _NUMBERS:
            if not isinstance(getattr(self, name), int | float):
                raise UserError(f"Dispatch.{name} must be a number, not {getattr(self, name)!r}")
        if not 0 < self.capacity_factor < float("inf"):
            raise UserError(
                f"Dispatch.capacity_factor ({self.capacity_factor}) must be above 0: experts "
                "without slots would drop every token; 1.25 is usual"
            )
        if self.buffer_factor != 0 and not 1 <= self.buffer_factor < float("inf"):
            raise UserError(
                f"Dispatch.buffer_factor ({self.buffer_factor}) must be 0, room for all, or at "
                "least 1, room for the average"
            )
        if not 0 <= self.jitter < 1:
            raise UserError(f"Dispatch.jitter ({self.jitter}) must be at least 0 and below 1")

    def without_drops(self) -> "Dispatch":
        """The same for measuring and generating: nothing is dropped, whatever training does."""
        strategy = "dropless" if self.strategy == "capacity" else self.strategy
        return dataclasses.replace(self, strategy=strategy, jitter=0.0)


DEFAULT_DISPATCH = Dispatch()
