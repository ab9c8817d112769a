"""Pictures of loading: the memory that live tensors hold, step by step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.ticker import MultipleLocator
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from annotated_src.figures.style import BLUE, GREY, INK, PALE_ORANGE, BookFigure, panels

READ = PALE_ORANGE  # a pale orange: it must stay readable beside the blue


class Ledger(TorchDispatchMode):
    """Keep account of the memory behind all tensors that operations make.

    A page is written at each operation that does more than look: which storages are
    alive, its result included. Bytes are counted, not measured, so that the account is
    the same on every machine. Views share a storage, which counts once. The meta device
    has no memory, and does not count.

    phase is a word for what is going on; each storage remembers the one it was born in.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.alive: dict[int, StorageWeakRef] = {}
        self.sizes: list[int] = []
        self.born: list[str] = []
        self.pages: list[tuple[str, frozenset[int]]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, list | tuple) else (result,)
        for output in outputs:
            if isinstance(output, Tensor):
                self.enter(output)
        if not func.is_view:
            self.write()
        return result

    def enter(self, tensor: Tensor) -> int | None:
        """Return the number of a tensor's storage, a new one if it is not known."""
        if tensor.device.type == "meta" or not tensor.untyped_storage().nbytes():
            return None
        ref = StorageWeakRef(tensor.untyped_storage())
        for number, known in self.alive.items():
            if known.cdata == ref.cdata and not known.expired():
                return number
        self.alive[len(self.sizes)] = ref
        self.sizes.append(tensor.untyped_storage().nbytes())
        self.born.append(self.phase)
        return len(self.sizes) - 1

    def write(self) -> None:
        """Strike out what is no longer alive, and write a page."""
        self.alive = {n: r for n, r in self.alive.items() if not r.expired()}
        self.pages.append((self.phase, frozenset(self.alive)))


class MemoryData(NamedTuple):
    """Bytes at each step: of what the model keeps, and of what is thrown away."""

    way: str
    phases: tuple[str, ...]  # what went on at each step
    kept: Int[Tensor, "steps"]
    built: Int[Tensor, "steps"]  # thrown away, and made in the phase "build"
    read: Int[Tensor, "steps"]  # thrown away, and made in another

    @property
    def total(self) -> Int[Tensor, "steps"]:
        """Everything alive at each step."""
        return self.kept + self.built + self.read

    @property
    def final(self) -> int:
        """The bytes of the finished model."""
        return int(self.kept[-1])

    @property
    def peak(self) -> int:
        """The most that was alive at any step."""
        return int(self.total.max())


def memory_data(way: str, load: Callable[[Ledger], nn.Module]) -> MemoryData:
    """Watch a function load a model; it may set the ledger's phase as it goes."""
    with Ledger() as ledger:
        model = load(ledger)
        ledger.write()
    weights = (*model.parameters(), *model.buffers())
    finished = {ledger.enter(weight) for weight in weights}

    def bytes_of(numbers: Iterable[int]) -> int:
        return sum(ledger.sizes[number] for number in numbers)

    kept, built, read = [], [], []
    for _, alive in ledger.pages:
        lost = alive - finished
        early = {number for number in lost if ledger.born[number] == "build"}
        kept.append(bytes_of(alive & finished))
        built.append(bytes_of(early))
        read.append(bytes_of(lost - early))
    phases = tuple(phase for phase, _ in ledger.pages)
    return MemoryData(way, phases, *map(torch.tensor, (kept, built, read)))


def peak_by_formula(shards: Sequence[Sequence[int]], stored: int, wanted: int) -> int:
    """Work out the most bytes alive while shards are read whole and used up.

    shards are the numbers of weights of each tensor, stored and wanted the bytes a
    weight has in the file and in the model. If they are equal, nothing is cast, and a
    tensor that was read becomes the model's.
    """
    placed, most = 0, 0
    for shard in shards:
        waiting = sum(shard)
        most = max(most, placed * wanted + waiting * stored)
        for numbers in shard:
            placed += numbers
            if stored != wanted:  # now both forms of this tensor exist
                most = max(most, placed * wanted + waiting * stored)
            waiting -= numbers
    return most


def draw_memory(ways: Sequence[MemoryData]) -> BookFigure:
    """Draw each way as a hill: what is kept below, what is thrown away on top of it."""
    heights = [max(1.7, way.peak / way.final + 0.5) for way in ways]
    figure, axes = panels(
        len(ways), 1, height=7.2, gridspec_kw={"height_ratios": heights}
    )
    for ax, way, height in zip(axes, ways, heights, strict=True):
        _draw_hill(ax, way, height)
    axes[-1].set_xlabel("operations, from the first to the last")
    return figure


def _draw_hill(ax: Axes, data: MemoryData, height: float) -> None:
    steps = torch.arange(len(data.phases)).numpy()
    floor = torch.zeros(len(steps))
    for layer, colour, ink, words in (
        (data.kept, BLUE, "white", "the model"),
        (data.built, GREY, INK, "random numbers,\nto be written over"),
        (data.read, READ, INK, "read from\nthe files"),
    ):
        top = floor + layer / data.final
        ax.fill_between(steps, floor, top, color=colour, lw=0, step="post")
        if (spot := _room_for_words(floor, top)) is not None:
            ax.text(*spot, words, color=ink, ha="center", va="center")
        floor = top
    ax.step(steps, floor, color=INK, lw=1.2, where="post")
    ax.axhline(1, color=INK, lw=1, ls=(0, (4, 3)))
    ax.set(xlim=(0, len(steps) - 1), ylim=(0, height), ylabel="copies")
    ax.yaxis.set_major_locator(MultipleLocator(1))
    _mark_phases(ax, data)
    at, peak = int(data.total.argmax()), data.peak / data.final
    ax.plot(at, peak, "o", color=INK, ms=4, clip_on=False)
    ax.text(at, peak + 0.09, f"peak {peak:.2f}", ha="right", va="bottom", weight="bold")
    ax.set_title(data.way, loc="left")


def _room_for_words(floor: Tensor, top: Tensor) -> tuple[float, float] | None:
    """Find a place in a layer, off the line at 1, if it is high and long enough."""
    high = (top - floor > 0.6).nonzero().flatten()
    if len(high) < 0.15 * len(top):
        return None
    middle = int(high[len(high) // 2])
    low, thick = float(floor[middle]), float(top[middle] - floor[middle])
    return float(middle), low + thick * (0.75 if low < 1 < low + thick else 0.5)


def _mark_phases(ax: Axes, data: MemoryData) -> None:
    begins = [
        step
        for step, phase in enumerate(data.phases)
        if step == 0 or phase != data.phases[step - 1]
    ]
    ends = [*begins[1:], len(data.phases) - 1]
    for begin in begins[1:]:
        ax.axvline(begin, color=GREY, lw=0.8, ls=(0, (1, 2)), zorder=0)
    middles = [(begin + end) / 2 for begin, end in zip(begins, ends, strict=True)]
    ax.set_xticks(middles, [data.phases[begin] for begin in begins])
    ax.tick_params(axis="x", length=0)
