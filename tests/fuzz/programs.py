"""Random attention programs: a grammar over hypothesis' choices, rendered as Python source.

An axis has one letter everywhere: b(atch), h(ead), q(uery), k(ey), d and e (head sizes of q and v); g(roup) and its
r(epetitions) where heads are split in two, n where batch and heads are one. The first option of every choice is the
plainest, so that hypothesis shrinks towards a plain attention.
"""

import dataclasses
from collections.abc import Callable

from hypothesis import strategies as st

INF = 'float("-inf")'
EINSUM_LETTERS = ("bhqkdegr", "zntsfvmo", "bhijcdgx", "abcdefgh")


@dataclasses.dataclass(frozen=True)
class Program:
    """``source`` defines ``program`` and ``inputs``; ``oddities`` names what makes it no ordinary attention."""

    source: str
    oddities: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Frame:
    """The axes of the operands and of the scores, outermost first."""

    q: str
    k: str
    v: str
    scores: str
    out: str


class Writer:
    """Draws the choices of one program and collects its lines."""

    def __init__(self, draw: Callable) -> None:
        self.draw = draw
        self.lines: list[str] = []
        self.inputs: dict[str, str] = {}
        self.constants: dict[str, str] = {}
        self.oddities: list[str] = []
        self.taken: set[str] = set()
        self.hidden_once: list[str] = []  # conditions that the scores were hidden by, as aligned text (True: visible)
        self.sizes: dict[str, int] = {}
        self.frame = Frame("", "", "", "", "")
        self.sink = False
        self.broadcast = False  # whether the keys' one head is left to broadcasting
        self.may_be_odd = self.chance(40)

    # --------------------------------------------------------------------------------------------- choices

    def pick(self, *options):
        return self.draw(st.sampled_from(options))

    def integer(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def chance(self, percent: int) -> bool:
        return self.draw(st.integers(0, 99)) >= 100 - percent

    def slip(self, what: str, percent: int = 8) -> bool:
        """Whether to do something that attention does not do; only in programs that may be odd."""
        if self.may_be_odd and self.chance(percent):
            self.oddities.append(what)
            return True
        return False

    # --------------------------------------------------------------------------------------------- text

    def fresh(self, stem: str) -> str:
        name = next(n for n in (stem, *(f"{stem}{i}" for i in range(2, 99))) if n not in self.taken)
        self.taken.add(name)
        return name

    def let(self, stem: str, text: str) -> str:
        name = self.fresh(stem)
        self.lines.append(f"{name} = {text}")
        return name

    def set(self, name: str, text: str) -> None:
        self.lines.append(f"{name} = {text}")

    def do(self, text: str) -> None:
        self.lines.append(text)

    def input(self, stem: str, text: str) -> str:
        name = self.fresh(stem)
        self.inputs[name] = text
        return name

    def constant(self, stem: str, text: str) -> str:
        name = self.fresh(stem.upper())
        self.constants[name] = text
        return name

    def shape(self, axes: str) -> tuple[int, ...]:
        return tuple(self.sizes[a] for a in axes)

    def dims(self, axes: str, *more: int) -> str:
        return ", ".join(str(n) for n in (*self.shape(axes), *more))

    def randn(self, stem: str, axes: str) -> str:
        return self.input(stem, f"torch.randn({self.dims(axes)})")

    def render(self, result: str) -> Program:
        constants = [f"{name} = {text}" for name, text in self.constants.items()]
        body = [f"    {line}" for line in (*self.lines, f"return {result}")]
        signature = f"def program({', '.join(self.inputs)}):"
        inputs = ["def inputs():", "    return [", *(f"        {text}," for text in self.inputs.values()), "    ]"]
        source = "\n".join((*constants, "", signature, *body, "", *inputs))
        return Program(source.strip() + "\n", tuple(self.oddities))

    # --------------------------------------------------------------------------------------------- axes

    @property
    def dim(self) -> int:
        """The scores' axis of the keys."""
        axes = self.frame.scores
        return axes.index("k") - len(axes)

    def available(self) -> str:
        """The axes that a mask may have."""
        axes = self.frame.scores
        if "n" in axes or "g" in axes:
            return "bhqk"
        return "".join(a for a in "bhqk" if a in axes)

    def align(self, name: str, axes: str) -> str:
        """``name``, a tensor with these axes, as what broadcasts to the scores."""
        target = self.frame.scores
        if "n" in target and set(axes) & set("bh"):
            sizes = [str(self.sizes[a]) if a in axes or a in "bh" else "1" for a in "bhqk"]
            whole = f"{self._broadcast(name, axes, 'bhqk')}.expand({', '.join(sizes)})"
            return f"{whole}.reshape({self.sizes['n']}, {sizes[2]}, {sizes[3]})"
        if "g" in target and "h" in axes:
            split = self.let("split", f"{name}.unflatten({axes.index('h')}, ({self.dims('gr')}))")
            return self._broadcast(split, axes.replace("h", "gr"), target)
        return self._broadcast(name, axes, target)

    @staticmethod
    def _broadcast(name: str, axes: str, target: str) -> str:
        order = [a for a in target if a in axes]
        if order != list(axes):
            name = f"{name}.permute({', '.join(str(axes.index(a)) for a in order)})"
        index = [":" if a in axes else "None" for a in target]
        while index[:1] == ["None"]:
            del index[0]
        return f"{name}[{', '.join(index)}]" if "None" in index else name

    def positions(self) -> tuple[str, str]:
        """Names of the positions of queries and keys, as a column and a row."""
        if "i" not in self.taken:
            how = self.pick("index", "unsqueeze", "last")
            if how == "unsqueeze":
                self.let("i", f"torch.arange({self.sizes['q']}).unsqueeze(-1)")
                self.let("j", f"torch.arange({self.sizes['k']}).unsqueeze(0)")
            elif how == "last" and self.sizes["k"] >= self.sizes["q"]:
                self.let("j", f"torch.arange({self.sizes['k']})")
                self.let("i", f"j[-{self.sizes['q']}:, None]")
            else:
                self.let("i", f"torch.arange({self.sizes['q']})[:, None]")
                self.let("j", f"torch.arange({self.sizes['k']})[None, :]")
        return "i", "j"


# ------------------------------------------------------------------------------------------------- operands


def choose_sizes(w: Writer) -> None:
    w.sizes["b"] = w.pick(2, 1, 3)
    w.sizes["g"] = w.pick(2, 1, 3, 4)
    w.sizes["r"] = 1
    w.sizes["q"] = w.pick(5, 1, 2, 3, 4, 7, 9)
    w.sizes["k"] = w.sizes["q"] if w.chance(60) else w.pick(5, 1, 2, 3, 4, 6, 8)
    w.sizes["d"] = w.pick(8, 2, 4, 5, 16, 1)
    w.sizes["e"] = w.sizes["d"] if w.chance(75) else w.pick(8, 1, 3)


def finish_sizes(w: Writer) -> None:
    w.sizes["h"] = w.sizes["g"] * w.sizes["r"]
    w.sizes["n"] = w.sizes["b"] * w.sizes["h"]


def operands(w: Writer) -> tuple[str, str, str]:
    """q, k and v, each with the axes that ``w.frame`` says."""
    choose_sizes(w)
    kind = w.pick("heads first", "einsum", "grouped", "merged", "one head")
    if kind != "one head" and w.chance(30):
        w.sizes["r"] = w.pick(2, 3)
    finish_sizes(w)
    if kind == "one head":
        lead = w.pick("b", "")
        w.frame = Frame(f"{lead}qd", f"{lead}kd", f"{lead}ke", f"{lead}qk", f"{lead}qe")
        return w.randn("q", w.frame.q), w.randn("k", w.frame.k), w.randn("v", w.frame.v)
    if kind == "einsum":
        w.sizes["g"], w.sizes["r"] = w.sizes["h"], 1
        scores = w.pick("bhqk", "bqhk", "hbqk", "bhkq")
        w.frame = Frame(
            w.pick("bqhd", "bhqd"), w.pick("bkhd", "bhkd"), w.pick("bkhe", "bhke"), scores, w.pick("bqhe", "bhqe")
        )
        return w.randn("q", w.frame.q), w.randn("k", w.frame.k), w.randn("v", w.frame.v)
    if kind == "grouped":
        w.frame = Frame("bgrqd", "bgkd", "bgke", "bgrqk", "bgrqe")
        if w.chance(50):
            return w.randn("q", "bgrqd"), w.randn("k", "bgkd"), w.randn("v", "bgke")
        q, k, v = (w.randn("q", "bhqd"), w.randn("k", "bgkd"), w.randn("v", "bgke"))
        split = w.pick(f"unflatten(1, ({w.dims('gr')}))", f"reshape({w.dims('bgrqd')})")
        w.set(q, f"{q}.{split}")
        return q, k, v
    w.frame = Frame("bhqd", "bhkd", "bhke", "bhqk", "bhqe")
    q, k, v = heads_first(w, may_broadcast=kind != "merged")
    if kind == "merged":
        w.frame = Frame("nqd", "nkd", "nke", "nqk", "nqe")
        for x, axes in zip((q, k, v), ("nqd", "nkd", "nke")):
            w.set(x, f"{x}.{w.pick(f'reshape({w.dims(axes)})', 'flatten(0, 1)')}")
    return q, k, v


def heads_first(w: Writer, may_broadcast: bool) -> tuple[str, str, str]:
    """q, k and v as [b, h, s, d], with the heads of k and v repeated or, of one, left as it is."""
    alike = w.sizes["q"] == w.sizes["k"] and w.sizes["d"] == w.sizes["e"] and w.sizes["r"] == 1
    source = w.pick("as is", "sequence first", "flat", "projected", *(("packed",) * 3 if alike else ()))
    b, h, s, d = w.shape("bhqd")
    if source == "packed":
        heads = w.pick("own axis", "flat")
        if heads == "own axis":
            x = w.input("qkv", f"torch.randn({b}, {s}, 3, {h}, {d})")
            parts = w.pick(
                f"{x}.permute(2, 0, 3, 1, 4).unbind(0)",
                f"{x}.permute(2, 0, 3, 1, 4)",
                f"(t.transpose(1, 2) for t in {x}.unbind(2))",
                f"(t.squeeze(2).transpose(1, 2) for t in {x}.chunk(3, dim=2))",
            )
        else:
            x = w.input("qkv", f"torch.randn({b}, {s}, {3 * h * d})")
            thirds = w.pick(
                f"{x}.chunk(3, dim=-1)",
                f"{x}.split({h * d}, dim=-1)",
                f"({x}[..., : {h * d}], {x}[..., {h * d} : {2 * h * d}], {x}[..., {2 * h * d} :])",
            )
            parts = f"(t.{w.pick('view', 'reshape')}({b}, {s}, {h}, {d}).transpose(1, 2) for t in {thirds})"
        w.taken |= {"q", "k", "v"}
        w.do(f"q, k, v = {parts}")
        return "q", "k", "v"
    names = []
    for stem, axes in (("q", "bhqd"), ("k", "bgkd"), ("v", "bgke")):
        batch, heads, rows, size = w.shape(axes)
        if source == "as is":
            names.append(w.randn(stem, axes))
            continue
        if source == "sequence first":
            names.append(w.input(stem, f"torch.randn({batch}, {rows}, {heads}, {size})"))
            w.set(stem, f"{stem}.{w.pick('transpose(1, 2)', 'permute(0, 2, 1, 3)', 'movedim(2, 1)')}")
            continue
        if source == "flat":
            names.append(w.input(stem, f"torch.randn({batch}, {rows}, {heads * size})"))
        else:
            names.append(stem)
            w.taken.add(stem)
            x = f"x_{axes[2]}"
            if x not in w.taken:
                w.input(x, f"torch.randn({batch}, {rows}, 6)")
            weight = w.input(f"w_{stem}", f"torch.randn({heads * size}, 6) / 2")
            w.set(stem, w.pick(f"F.linear({x}, {weight})", f"{x} @ {weight}.T"))
        split = w.pick(f"view({batch}, {rows}, {heads}, {size})", f"unflatten(-1, ({heads}, {size}))")
        w.set(stem, f"{stem}.{split}.transpose(1, 2)")
    w.broadcast = may_broadcast and w.sizes["g"] == 1 and w.sizes["r"] > 1 and w.chance(50)
    if w.sizes["r"] > 1 and not w.broadcast:
        b, g, r, s = w.shape("bgrk")
        for x, size in zip(names[1:], w.shape("de")):
            w.set(
                x,
                w.pick(
                    f"{x}.repeat_interleave({r}, dim=1)",
                    f"{x}[:, :, None].expand({b}, {g}, {r}, {s}, {size}).reshape({b}, {g * r}, {s}, {size})",
                    f"{x}[:, torch.arange({g * r}) // {r}]",
                    f"torch.stack([{x}] * {r}, dim=2).flatten(1, 2)",
                    *([f"{x}.repeat(1, {r}, 1, 1)", f"torch.cat([{x}] * {r}, 1)"] if w.slip("tiled heads", 30) else []),
                ),
            )
    return tuple(names)


def einsum(w: Writer, a: str, b: str, out: str, x: str, y: str) -> str:
    equation = f"{a},{b}->{out}".translate(str.maketrans(EINSUM_LETTERS[0], w.pick(*EINSUM_LETTERS)))
    return f'torch.einsum("{equation}", {x}, {y})'


def product(w: Writer, q: str, k: str) -> str:
    frame = w.frame
    lead = frame.scores[:-2]
    if (frame.q, frame.k, frame.scores) == (f"{lead}qd", f"{lead}kd", f"{lead}qk"):
        transposed = w.pick("transpose(-2, -1)", "mT", "transpose(-1, -2)", "movedim(-1, -2)")
        options = [f"{q} @ {k}.{transposed}", f"torch.matmul({q}, {k}.{transposed})", f"({k} @ {q}.mT).mT"]
        if lead != "n" and not w.broadcast:
            options.append(einsum(w, frame.q, frame.k, frame.scores, q, k))
        if lead == "n":
            scale = w.pick("1.0", "0.5", "0.25")
            options += [f"torch.bmm({q}, {k}.{transposed})"]
            empty = f"torch.empty({w.dims('nqk')}, dtype={q}.dtype)"
            options += [f"torch.baddbmm({empty}, {q}, {k}.{transposed}, beta=0, alpha={scale})"]
            bias = w.fresh("start")
            options += [f"torch.baddbmm({bias}, {q}, {k}.{transposed}, alpha={scale})"]
            chosen = w.pick(*options)
            if bias in chosen:
                w.inputs[bias] = w.pick(f"torch.randn({w.dims('nqk')})", f"torch.randn(1, {w.dims('qk')})")
            return chosen
        return w.pick(*options)
    if "g" in frame.scores and w.chance(50):
        return f"{q} @ {k}{w.pick('[:, :, None]', '.unsqueeze(2)')}.mT"
    return einsum(w, frame.q, frame.k, frame.scores, q, k)


# ------------------------------------------------------------------------------------------------- scale


def number_for_scale(w: Writer) -> str:
    return w.pick("0.5", f"{w.sizes['d']} ** -0.5", "0.25", f"(1 / math.sqrt({w.sizes['d']}))", "1.3")


def scale_operands(w: Writer, q: str, k: str) -> bool:
    """Scale q or k; whether that was done."""
    where = w.pick("scores", "q", "k", "both", "nowhere")
    if where == "both":
        for x in (q, k):
            w.set(x, f"{x} * {w.sizes['d']} ** -0.25")
    elif where in "qk":
        x = {"q": q, "k": k}[where]
        number = number_for_scale(w)
        w.set(x, w.pick(f"{x} * {number}", f"{x} / 2.0", f"{number} * {x}", f"-{x}" if where == "q" else f"{x} * 0.7"))
    return where != "scores"


def scale_scores(w: Writer, s: str) -> None:
    number = number_for_scale(w)
    w.set(s, w.pick(f"{s} * {number}", f"{s} / {number}", f"{number} * {s}", f"torch.div({s}, 1.5)", f"{s}.mul(0.3)"))


# ------------------------------------------------------------------------------------------------- masks


def visible_atom(w: Writer) -> tuple[str, str]:
    """(name, axes) of a condition that says which keys are visible."""
    has = w.available()
    kinds = ["causal", "window", "input", "positions", "table"]
    if "b" in has:
        kinds += ["padding", "padding", "lengths", "documents"]
    if "h" in has:
        kinds += ["of heads"]
    kind = w.pick(*kinds)
    sq, sk = w.shape("qk")
    offset = w.pick(0, sk - sq, 1, -1, 2)
    if kind == "causal":
        i, j = w.positions() if w.chance(50) else ("", "")
        if i:
            text = w.pick(f"{j} <= {i} + {offset}", f"{i} >= {j}", f"{j} - {i} < {offset + 1}", f"~({j} > {i})")
        else:
            ones = f"torch.ones({sq}, {sk}, dtype=torch.bool)"
            text = w.pick(
                f"{ones}.tril({offset})",
                f"torch.tril(torch.ones({sq}, {sk}), diagonal={offset}) != 0",
                f"torch.triu(torch.ones({sq}, {sk}), diagonal={offset + 1}) == 0",
                f"~{ones}.triu({offset + 1})",
                f"torch.ones({sq}, {sk}).tril({offset}).bool()",
            )
        return w.let("causal", text), "qk"
    if kind in ("window", "positions"):
        i, j = w.positions()
        n = w.integer(1, 4)
        texts = {
            "window": (f"({i} - {j}).abs() <= {n}", f"({j} <= {i}) & ({j} > {i} - {n})", f"{i} - {j} < {n}"),
            "positions": (
                f"({j} <= {i}) | ({j} < {n})",
                f"{i} // {n} == {j} // {n}",
                f"{i} // {n} >= {j} // {n}",
                f"({i} - {j}) % {n} == 0",
                f"({j} >= {n - 1}) | ({i} == {j})",
                f"{j} * 2 <= {i} + {n}",
                f"{i} + {j} >= {n}",
                f"({i} != {j})",
            ),
        }
        return w.let("near" if kind == "window" else "seen", w.pick(*texts[kind])), "qk"
    if kind == "input":
        axes = "".join(a for a in has if a in w.pick("qk", "bqk", "bhqk", "hqk", "k", "bk", "q", "hk", "bq"))
        p = w.pick(0.2, 0.5, 0.8)
        return w.input("mask", f"torch.rand({w.dims(axes)}) > {p}") if axes else w.input(
            "mask", "torch.tensor(True)"
        ), axes
    if kind == "table":
        text = w.pick(
            f"torch.ones({sq}, {sk}, dtype=torch.bool).tril({offset})",
            f"torch.arange({sq * sk}).view({sq}, {sk}) % 3 != 1",
            f"torch.arange({sk}) <= torch.arange({sq})[:, None]",
        )
        return w.constant("mask", text), "qk"
    if kind == "padding":
        text = w.pick(
            f"torch.arange({sk}).expand({w.dims('b')}, -1) < {max(1, sk - 1)}",
            f"torch.rand({w.dims('bk')}) > 0.3",
            f"torch.arange({w.dims('b')})[:, None].expand(-1, {sk}) > 0",
            f"torch.arange({sk}) >= torch.arange({w.dims('b')})[:, None]",
        )
        return w.input("padding", text), "bk"
    if kind == "lengths":
        lengths = w.input("lengths", f"torch.randint({w.pick(1, 0)}, {sk + 1}, ({w.dims('b')},))")
        return w.let(
            "valid",
            w.pick(f"torch.arange({sk}) < {lengths}[:, None]", f"torch.arange({sk})[None] < {lengths}.view(-1, 1)"),
        ), "bk"
    if kind == "documents":
        of_k = w.input("documents", f"torch.randint(0, 2, ({w.dims('bk')}))")
        of_q = of_k if sq == sk else w.input("documents", f"torch.randint(0, 2, ({w.dims('bq')}))")
        relation = w.pick("==", ">=", "!=")
        return w.let("same", f"{of_q}[:, :, None] {relation} {of_k}[:, None, :]"), "bqk"
    i, j = w.positions()
    reach = w.let(
        "reach",
        w.pick(f"torch.arange({w.sizes['h']})[:, None, None]", f"torch.arange(1, {w.sizes['h'] + 1}).view(-1, 1, 1)"),
    )
    return w.let(
        "seen", w.pick(f"{j} <= {i} + {reach}", f"({i} - {j}).abs() <= {reach}", f"{j} >= {reach} - {i}")
    ), "hqk"


def visible(w: Writer) -> str:
    """The name of a condition that broadcasts to the scores, perhaps of several atoms; True where visible."""
    name, axes = visible_atom(w)
    aligned = w.align(name, axes)
    if w.slip("mask on the other axis", 5) and "k" in axes and "q" not in axes and w.sizes["q"] == w.sizes["k"]:
        aligned = w.align(name, axes.replace("k", "q"))
    for _ in range(w.pick(0, 0, 0, 1, 1, 2)):
        other, other_axes = visible_atom(w)
        other = w.align(other, other_axes)
        aligned = w.pick(
            f"({aligned} & {other})",
            f"({aligned} | {other})",
            f"torch.logical_and({aligned}, {other})",
            f"({aligned} & ~{other})",
            f"~(~{aligned} | ~{other})",
            f"({aligned} ^ {other})",
            f"({aligned} * {other})",
        )
    text = f"~{aligned}" if w.chance(5) else aligned
    name = w.let("visible", text)
    if w.slip("mask written in place", 6):
        w.do(
            w.pick(f"{name} = {name}.clone(); {name}[..., 0] = True", f"{name} = {name} & True; {name}.logical_not_()")
        )
    return name


def fill(w: Writer, s: str) -> str:
    return w.pick(
        INF, "-1e9", f"torch.finfo({s}.dtype).min", "-1e4", "-1e30", "-float('inf')", "-math.inf", "-30000.0",
        "torch.finfo(torch.float32).min",
    )  # fmt: skip


WRONG_FILLS = ("-1.0", "0.0", "-50.0", "-999.0", "1e9", "float('nan')", "float('inf')", "-88.0")


def hide_by_unknown(w: Writer, s: str) -> None:
    """A mask that is an argument, as numbers."""
    has = w.available()
    axes = "".join(a for a in has if a in w.pick("qk", "bhqk", "bqk", "k", "bk"))
    zeros = f"torch.zeros({w.dims(axes)})"
    number = fill(w, s).replace(f"{s}.dtype", "torch.float32")
    hidden = w.align(w.input("hidden", f"{zeros}.masked_fill(torch.rand({w.dims(axes)}) > 0.6, {number})"), axes)
    w.set(s, w.pick(f"{s} + {hidden}", f"{hidden} + {s}"))
    w.hidden_once.append(f"({hidden} == 0)")


def hide(w: Writer, s: str) -> None:
    if w.chance(10):
        hide_by_unknown(w, s)
        return
    m = visible(w)
    value = w.pick(*WRONG_FILLS) if w.slip("wrong fill", 10) else fill(w, s)
    how = w.pick(
        "masked_fill", "where", "added where", "filled", "one less", "in place", "log", "condition", "fill_", "assigned"
    )  # fmt: skip
    if how == "masked_fill":
        w.set(s, w.pick(f"{s}.masked_fill(~{m}, {value})", f"torch.masked_fill({s}, {m} == 0, {value})"))
    elif how == "where":
        number = value if w.chance(60) else f"torch.tensor({value}, dtype={s}.dtype)"
        w.set(s, w.pick(f"torch.where({m}, {s}, {number})", f"torch.where(~{m}, {number}, {s})"))
    elif how == "added where":
        w.set(s, f"{s} + torch.where({m}, 0.0, {value}).to({s}.dtype)")
    elif how == "filled":
        zeros = w.pick(f"torch.zeros_like({m}, dtype={s}.dtype)", f"torch.zeros({m}.shape, dtype={s}.dtype)")
        w.set(s, f"{s} + {zeros}.masked_fill({w.pick(f'~{m}', f'{m}.logical_not()')}, {value})")
    elif how == "one less":
        value = "-1e9" if "inf" in value or "nan" in value else value
        w.set(s, w.pick(f"{s} + (1.0 - {m}.to({s}.dtype)) * {value}", f"{s} + (~{m}).to({s}.dtype) * {value}"))
    elif how == "in place":
        w.do(f"{s}.masked_fill_(~{m}, {value})")
    elif how == "assigned":
        w.do(f"{s}[(~{m}).expand_as({s})] = {value}")
    elif how == "log":
        w.set(s, f"{s} + {m}.to({s}.dtype).log()")
    elif how == "condition":
        other = f"{s} - 1e9" if w.slip("where of two scores", 20) else f"torch.full_like({s}, {value})"
        w.set(s, f"torch.where({m}, {s}, {other})")
    else:
        added = w.let("added", f"torch.zeros({m}.shape, dtype={s}.dtype)")
        w.do(f"{added}.masked_fill_(~{m}, {value})")
        w.set(s, f"{s} + {added}")
    w.hidden_once.append(m)


# ------------------------------------------------------------------------------------------------- biases


def bias_atom(w: Writer, s: str) -> tuple[str, str]:
    """(text, axes) of something of ordinary size to add to the scores."""
    has = w.available()
    kind = w.pick("input", "distance", "constant", *(("alibi", "table", "bucket") if "h" in has else ()))
    h, sq, sk = w.sizes["h"], *w.shape("qk")
    if kind == "input":
        axes = "".join(a for a in has if a in w.pick("qk", "bhqk", "hqk", "bqk", "k", "bk", "hk", "q", "bq", "h"))
        bias = w.randn("bias", axes) if axes else w.input("bias", "torch.randn(())")
        return (w.let("bias", f"{bias}.detach()") if w.chance(20) else bias), axes
    if kind == "constant":
        return w.let("bias", f"{w.constant('bias', f'torch.randn({sq}, {sk})')}.to({s}.dtype)"), "qk"
    i, j = w.positions()
    if kind == "distance":
        text = w.pick(f"-0.1 * ({i} - {j}).abs()", f"({j} - {i}) * 0.25", f"torch.log1p(({i} - {j}).abs().float())")
        return w.let("distance", f"({text}).to({s}.dtype)"), "qk"
    if kind == "alibi":
        slopes = w.pick(f"2.0 ** -torch.arange(1, {h + 1})", "input")
        slopes = w.input("slopes", f"torch.rand({h})") if slopes == "input" else w.let("slopes", slopes)
        text = w.pick(f"{slopes}[:, None, None] * ({j} - {i})", f"-{slopes}.view(-1, 1, 1) * ({i} - {j}).abs()")
        return w.let("alibi", f"({text}).to({s}.dtype)"), "hqk"
    if kind == "table":
        size = max(sq, sk) * 2 - 1
        table = w.input("table", f"torch.randn({h}, {size})")
        return w.let("relative", f"{table}[:, {j} - {i} + {max(sq, sk) - 1}]"), "hqk"
    table = w.input("table", f"torch.randn(5, {h})")
    index = f"({j} - {i}).clamp(-2, 2) + 2"
    text = w.pick(f"{table}[{index}]", f"F.embedding({index}, {table})")
    return w.let("bucketed", f"{text}.permute(2, 0, 1)"), "hqk"


def add_bias(w: Writer, s: str) -> None:
    name, axes = bias_atom(w, s)
    bias = w.align(name, axes)
    if w.chance(5):
        if w.hidden_once:
            w.oddities.append("masked scores subtracted")
        w.set(s, f"{bias} - {s}")
        return
    w.set(
        s,
        w.pick(
            f"{s} + {bias}", f"{bias} + {s}", f"{s} - {bias}", f"torch.add({s}, {bias}, alpha=0.5)",
            f"{s} + {bias} * 0.5", f"{s}.add({bias})",
        ),
    )  # fmt: skip
    if w.chance(8):
        w.lines[-1] = f"{s} += {bias}"


# ------------------------------------------------------------------------------------------------- scores


def cap(w: Writer, s: str) -> None:
    number = w.pick("5.0", "2.0", "30.0")
    w.set(s, w.pick(f"{number} * torch.tanh({s} / {number})", f"({s} / {number}).tanh() * {number}", f"{s}.tanh()"))
    if w.hidden_once:
        w.oddities.append("soft cap after a mask")


def subtract_maximum(w: Writer, s: str) -> None:
    dim = w.dim
    if w.slip("maximum over the wrong axis", 10):
        dim = -3 - w.dim
    top = w.pick(
        f"{s}.amax({dim}, keepdim=True)",
        f"{s}.max(dim={dim}, keepdim=True)[0]",
        f"{s}.amax(dim={dim}, keepdim=True).detach()",
    )
    w.set(s, f"{s} - {top}")


def cast(w: Writer, s: str) -> None:
    w.set(s, w.pick(f"{s}.float()", f"{s}.to(torch.float32)"))


def multiply(w: Writer, s: str) -> None:
    number = w.pick("0.5", "-1.0", "1.7")
    if w.hidden_once and number == "-1.0":
        w.oddities.append("masked scores negated")
    w.set(s, w.pick(f"{s} * {number}", f"{s} * {number}", f"-{s}" if number == "-1.0" else f"{s} / {number}"))


def temperature(w: Writer, s: str) -> None:
    axes = "".join(a for a in w.available() if a in w.pick("", "h", "hq", "q"))
    factor = w.input("temperature", f"torch.rand({w.dims(axes) if axes else '()'}) + 0.5")
    aligned = w.align(factor, axes) if axes else factor
    w.set(s, w.pick(f"{s} * {aligned}", f"{s} / {aligned}"))


def add_number(w: Writer, s: str) -> None:
    w.set(s, f"{s} {w.pick('+', '-')} {w.pick('1.5', '3')}")


def raise_lowest(w: Writer, s: str) -> None:
    low = f"torch.finfo({s}.dtype).min"
    w.set(s, w.pick(f"{s}.clamp(min={low})", f"torch.clamp({s}, {low})", f"torch.maximum({s}, torch.tensor({low}))"))


def odd_operation(w: Writer, s: str) -> None:
    """Something that no attention does to its scores."""
    what = w.pick(
        "times mask", "power", "clamped", "written", "moved", "fed back", "detached", "shifted", "hidden by values",
        "float mask", "key temperature", "transposed", "joined",
    )  # fmt: skip
    w.oddities.append(f"scores {what}")
    if what == "times mask":
        m = visible(w)
        w.set(s, w.pick(f"{s} * {m}", f"{s} * {m}.to({s}.dtype)", f"{s} * {m} + (1.0 - {m}.to({s}.dtype)) * -1e9"))
    elif what == "power":
        w.set(s, w.pick(f"{s} ** 2", f"{s}.abs()", f"torch.relu({s})", f"{s} * {s}", f"{s} + {s}", f"{s}.exp()",
                        f"{s}.relu().log()", f"{s}.abs().log1p()", f"{s} / (1 + {s}.abs())", f"-1 / {s}.relu()",
                        f"F.softplus({s})", f"torch.log(1 + {s}.exp())"))  # fmt: skip
    elif what == "clamped":
        w.set(s, w.pick(f"{s}.clamp(-1, 1)", f"{s}.clamp(max=2.0)", f"{s}.clamp(min=-2.0)", f"{s}.clamp(min=-1e4)"))
    elif what == "written":
        w.do(w.pick(f"{s}[..., 0] = {INF}", f"{s}[..., 0] = 0.5", f"{s}.diagonal(dim1=-2, dim2=-1).fill_({INF})",
                    f"{s}[..., 0].add_(1.0)", f"{s}.tril_()", f"{s}[..., 1:] -= 1e9"))  # fmt: skip
    elif what == "moved":
        w.set(
            s,
            w.pick(
                f"{s}.flip(-1)", f"{s}.roll(1, -1)", f"{s}.flip(-2)", f"{s}[..., torch.arange({w.sizes['k']}) // 2]"
            ),
        )
    elif what == "fed back":
        top = f"{s}.amax({w.dim}, keepdim=True)"
        w.set(s, w.pick(f"{s} + {s}.mean(-1, keepdim=True)", f"{s} - {s}.max()", f"{s} / (1 + {s}.abs().amax())",
                        f"{s} - {s}.amin({w.dim}, keepdim=True)", f"{s} + {top}"))  # fmt: skip
    elif what == "detached":
        w.set(s, w.pick(f"{s}.detach()", f"{s} + {s}.detach()", f"{s} - {s}.detach()"))
    elif what == "shifted":
        w.set(s, f"{s} + {w.pick(INF, '-1e9', '1e9', 'math.nan')}")
    elif what == "hidden by values":
        w.set(s, w.pick(f"{s}.masked_fill({s} == 0, {INF})", f"{s}.tril().masked_fill({s}.tril() == 0, {INF})",
                        f"torch.where({s} > 0, {s}, {INF})", f"{s}.masked_fill({s} < -1e3, {INF})"))  # fmt: skip
    elif what == "float mask":
        soft = w.input("soft", w.pick(f"torch.rand({w.dims('qk')})", f"torch.rand({w.dims('qk')}).round()"))
        ints = w.input("ints", f"torch.randint(0, 3, ({w.dims('qk')}))")
        name = w.align(w.pick(soft, ints), "qk")
        w.set(s, w.pick(f"{s} + (1 - {name}) * -1e9", f"{s} + {name} * -1e4", f"{s}.masked_fill({name} == 0, {INF})",
                        f"{s} + torch.log({name})", f"{s}.masked_fill({name} > 0.5, -1e9)"))  # fmt: skip
    elif what == "key temperature":
        factor = w.input("temperature", f"torch.rand({w.dims('k')}) + 0.5")
        w.set(s, f"{s} * {w.align(factor, 'k')}")
    elif what == "transposed":
        w.set(s, w.pick(f"{s}.mT", f"{s}.transpose(-1, -2).contiguous()", f"{s}.transpose(0, 1)"))
    else:
        w.set(
            s, w.pick(f"torch.cat([{s}, {s}], {w.dim})", f"torch.cat([{s}, {s}[..., :1]], -1)", f"F.pad({s}, (1, 0))")
        )


OPERATIONS = (
    hide, hide, hide, add_bias, add_bias, cap, subtract_maximum, cast, multiply, temperature, add_number, raise_lowest,
)  # fmt: skip


def join_sink(w: Writer, s: str) -> None:
    h, axes = w.sizes["h"], w.frame.scores
    kind = w.pick("learned", "number", "padded", "of a row")
    column = [1 if a == "k" else w.sizes[a] for a in axes]
    if kind == "padded" and axes[-1] == "k":
        w.set(s, f"F.pad({s}, (0, 1))")
    elif kind in ("learned", "of a row") and "h" in axes and "q" in axes:
        of = "h" if kind == "learned" else w.pick("q", "hq", "bq")
        sink = w.align(w.input("sink", f"torch.randn({h})") if of == "h" else w.randn("sink", of), of)
        w.set(s, f"torch.cat([{s}, {sink}.expand({', '.join(map(str, column))}).to({s}.dtype)], dim={w.dim})")
    else:
        w.set(s, f"torch.cat([{s}, torch.full(({', '.join(map(str, column))},), 0.5, dtype={s}.dtype)], dim={w.dim})")
    w.sink = True


# ------------------------------------------------------------------------------------------------- softmax


def softmax(w: Writer, s: str, v: str) -> str:
    """The weights' name; they are in v's dtype."""
    dim = w.dim
    if w.slip("softmax over another axis", 7):
        dim = w.pick(*(d for d in range(-len(w.frame.scores), 0) if d != dim))
    if w.slip("no softmax", 4):
        return w.let("weights", w.pick(f"torch.sigmoid({s})", f"F.log_softmax({s}, {dim})", f"F.softmin({s}, {dim})",
                                       f"torch.relu({s})", f"torch.exp({s})"))  # fmt: skip
    kind = w.pick("softmax", "softmax", "softmax", "wide", "quotient", "logsumexp", "log_softmax", "shown")
    if kind == "softmax":
        text = w.pick(
            f"torch.softmax({s}, dim={dim})", f"F.softmax({s}, {dim})", f"{s}.softmax({dim})", f"F.softmin(-{s}, {dim})"
        )  # fmt: skip
    elif kind == "wide":
        text = w.pick(f"F.softmax({s}, dim={dim}, dtype=torch.float32)", f"{s}.float().softmax({dim})")
    elif kind == "logsumexp":
        text = f"torch.exp({s} - torch.logsumexp({s}, {dim}, keepdim=True))"
    elif kind == "log_softmax":
        text = f"F.log_softmax({s}, dim={dim}).exp()"
    else:
        shift = w.pick(f" - {s}.amax({dim}, keepdim=True)", f" - {s}.amax({dim}, keepdim=True).detach()", "")
        e = w.let("e", f"torch.{w.pick('exp', 'exp', 'exp2')}({s}{shift})")
        if kind == "shown":
            factor = w.hidden_once[-1] if w.hidden_once and w.chance(50) else visible(w)
            w.set(e, w.pick(f"{e} * {factor}", f"{e} * {factor}.to({e}.dtype)"))
        total = f"{e}.sum({dim}, keepdim=True)"
        if w.slip("wrong sum", 10):
            total = w.pick(
                f"{e}.sum()",
                f"{total}.detach()",
                f"({total} ** 2)",
                f"({total} + 0.1)",
                f"{e}.sum({-3 - dim}, keepdim=True)",
            )
        total = w.pick(total, total, f"({total} + 1e-9)", f"{total}.clamp(min=1e-6)", f"({total} + 1)")
        text = w.pick(f"{e} / {total}", f"{e} * (1 / {total})")
    weights = w.let("weights", text)
    if w.sink:
        w.set(weights, f"{weights}.narrow({dim}, 0, {w.sizes['k']})")
    return weights


def after_softmax(w: Writer, weights: str, v: str, s: str) -> None:
    for _ in range(w.pick(0, 0, 1, 2)):
        m = w.hidden_once[-1] if w.hidden_once else None
        w.set(
            weights,
            w.pick(
                f"F.dropout({weights}, p=0.0)",
                f"F.dropout({weights}, 0.3, training=False)",
                f"{weights}.to({v}.dtype)",
                f"torch.nan_to_num({weights})",
                f"{weights}.nan_to_num(nan=0.0)",
                f"torch.where(torch.isnan({weights}), torch.zeros_like({weights}), {weights})",
                f"{weights}.masked_fill({weights} != {weights}, 0)",
                *((f"{weights}.masked_fill(~{m}, 0.0)",) * 2 if m else ()),
                *((f"torch.where({m}, {weights}, 0.0)", f"{weights} * {m}.to({weights}.dtype)") if m else ()),
            ),
        )
    if w.chance(15):
        axes = w.pick("h", "q", "k", "bq", "bk", "hk")
        factor = w.align(w.randn("factor", axes), axes)
        w.set(weights, w.pick(f"{weights} * {factor}", f"{factor} * {weights}", f"{weights} / ({factor}.abs() + 0.5)"))
    if w.slip("operation on the weights", 20):
        gate = w.input("gate", "torch.rand(()) + 0.5")
        a, b = w.shape("qk")
        w.set(
            weights,
            w.pick(
                f"{weights} * {gate}", f"{weights} ** 2", f"{weights} / {weights}.sum({w.dim}, keepdim=True)",
                f"{weights} + 0.1", f"{weights} * 0.5", f"torch.softmax({weights}, {w.dim})", f"{weights}.tril()",
                f"{weights}.flip(-1)", f"{weights}.detach()", f"{weights}.clamp(min=0.05)", f"{weights}.mT",
                f"{weights}.masked_fill({w.align(w.input('drop', f'torch.rand({a}, {b}) > 0.7'), 'qk')}, 0.0)",
                f"torch.nan_to_num({weights}, nan=1.0)", f"{weights}.cumsum(-1)", f"{weights} - 1 / {b}",
                f"{weights}.roll(1, 0)", f"1 - {weights}", f"-{weights}",
                f"{weights}.masked_fill({weights} < 0.1, 0.0)",
            ),
        )  # fmt: skip
    if w.slip("weights written in place", 4):
        w.do(w.pick(f"{weights}[..., 0] = 0.0", f"{weights}.mul_(2.0)"))
    w.set(weights, f"{weights}.to({v}.dtype)")


def value_product(w: Writer, weights: str, v: str) -> str:
    frame = w.frame
    if w.slip("other values", 8):
        w.set(v, w.pick(f"{v}.flip(-2)", f"{v}.roll(1, -2)", f"{v}.mT", f"{v} + 1.0", f"{v}.flip(0)", f"{v} * 2"))
    lead = frame.scores[:-2]
    if frame.scores.endswith("qk") and (frame.v, frame.out) == (f"{lead}ke", f"{lead}qe"):
        options = [f"{weights} @ {v}", f"torch.matmul({weights}, {v})", f"({v}.mT @ {weights}.mT).mT"]
        if lead == "n":
            options.append(f"torch.bmm({weights}, {v})")
        elif not w.broadcast:
            options.append(einsum(w, frame.scores, frame.v, frame.out, weights, v))
        return w.let("out", w.pick(*options))
    if "g" in frame.scores and w.chance(50):
        return w.let("out", f"{weights} @ {v}{w.pick('[:, :, None]', '.unsqueeze(2)')}")
    return w.let("out", einsum(w, frame.scores, frame.v, frame.out, weights, v))


def result(w: Writer, out: str) -> str:
    axes = w.frame.out
    if axes == "bhqe" and w.chance(40):
        b, s, width = w.sizes["b"], w.sizes["q"], w.sizes["h"] * w.sizes["e"]
        moved = f"{out}.transpose(1, 2)"
        return w.pick(
            moved,
            f"{moved}.reshape({b}, {s}, {width})",
            f"{moved}.contiguous().view({b}, {s}, {width})",
            f"{moved}.flatten(2)",
        )
    if axes == "nqe" and w.chance(40):
        return f"{out}.view({w.dims('bhqe')}).transpose(1, 2)"
    if axes == "bgrqe" and w.chance(40):
        return w.pick(f"{out}.flatten(1, 2)", f"{out}.permute(0, 3, 1, 2, 4).flatten(2)")
    return out


# ------------------------------------------------------------------------------------------------- programs


def sdpa(w: Writer) -> Program:
    """The operator itself."""
    choose_sizes(w)
    w.sizes["r"] = w.pick(1, 1, 2)
    finish_sizes(w)
    w.frame = Frame("bhqd", "bhkd", "bhke", "bhqk", "bhqe")
    gqa = w.sizes["r"] > 1 and w.chance(50)
    if gqa:
        q, k, v = w.randn("q", "bhqd"), w.randn("k", "bgkd"), w.randn("v", "bgke")
    else:
        q, k, v = heads_first(w, may_broadcast=True)
    if w.broadcast:
        for x in (k, v):
            w.set(x, f"{x}.expand(-1, {w.sizes['h']}, -1, -1)")
    options = ["enable_gqa=True"] if gqa else []
    kind = w.pick("none", "causal", "mask", "bias", "both")
    if kind == "causal":
        options.append("is_causal=True")
    elif kind != "none":
        mask = visible(w) if kind != "bias" else ""
        if kind == "bias" or kind == "both":
            bias = w.let("added", f"{w.align(*bias_atom(w, q))}.to({q}.dtype)")
            mask = bias if kind == "bias" else f"torch.where({mask}, {bias}, {fill(w, q)}).to({q}.dtype)"
        elif w.chance(40):
            mask = f"torch.where({mask}, 0.0, {fill(w, q)}).to({q}.dtype)"
        mask = w.let("attn_mask", mask)
        if w.chance(30):
            w.set(mask, f"{mask}.expand({w.dims('bhqk')})")
        options.append(f"attn_mask={mask}")
    if w.chance(40):
        options.append(f"scale={number_for_scale(w)}")
    out = w.let("out", f"F.scaled_dot_product_attention({', '.join([q, k, v, *options])})")
    return w.render(result(w, out))


def by_hand(w: Writer) -> Program:
    q, k, v = operands(w)
    scaled = scale_operands(w, q, k)
    if w.slip("q written in place", 5):
        w.set(q, f"{q} * 1.0")
        w.do(f"{q}.mul_(2.0)")
    s = w.let("scores", product(w, q, k))
    if w.slip("operands written in place", 5):
        w.do(w.pick(f"{q} = {q} + 0", f"{v} = {v} * 1; {v}[..., 0] = 1.0", f"{k} = {k} * 1; {k}.add_(1.0)"))
    if not scaled:
        scale_scores(w, s)
    for _ in range(w.pick(0, 1, 1, 2, 2, 3, 4)):
        if w.slip("", 15):
            w.oddities.pop()
            odd_operation(w, s)
        else:
            w.pick(*OPERATIONS)(w, s)
    if w.chance(7):
        join_sink(w, s)
        if w.chance(40):
            subtract_maximum(w, s)
    lse = ""
    if w.chance(8):
        lse = w.let("lse", f"torch.logsumexp({s}{w.pick('', '.float()')}, {w.dim}{w.pick('', ', keepdim=True')})")
    weights = softmax(w, s, v)
    after_softmax(w, weights, v, s)
    if not w.sink and w.chance(6):  # weights of the same scores, or of others
        other = w.pick(f"{s} * 0.5", f"{s}.abs()", f"torch.where({s} > 0, {s}, 0.0)")
        other = w.let("weights", f"torch.softmax({other}, dim={w.dim}).to({v}.dtype)")
        w.set(weights, w.pick(f"{weights} - 0.3 * {other}", f"{other} + {weights}", f"({weights} - {other}) * 0.5"))
    out = value_product(w, weights, v)
    if w.chance(6):
        values = w.let("values", f"{v} * 2.0")
        out = w.let("out", f"{out} - {value_product(w, weights, values)}")
    if lse and w.frame.scores.endswith("qk") and w.frame.out == w.frame.scores[:-1] + "e" and w.chance(70):
        share = w.let("share", f"torch.sigmoid({lse}.view({w.dims(w.frame.scores[:-1])}, 1) - 0.3)")
        w.set(out, w.pick(f"{out} * {share}.to({out}.dtype)", f"({out} * {share}).to({out}.dtype)"))
    elif lse:
        w.set(out, f"{out} + torch.tanh({lse}).sum().to({out}.dtype)")
    if not w.sink and w.chance(8):  # of the same scores
        second = w.let("weights", f"torch.softmax({s} * 0.5, dim={w.dim}).to({v}.dtype)")
        second = value_product(w, second, v)
        out = w.let("out", f"{out} + {second}")
    if w.slip("used twice", 6):
        used = w.pick(weights, s)
        return w.render(f"torch.cat([{out}.flatten(), {used}.flatten().to({out}.dtype)])")
    lead = w.frame.scores[:-2]
    is_plain = dataclasses.astuple(w.frame) == tuple(lead + x for x in ("qd", "kd", "ke", "qk", "qe"))
    if is_plain and w.sizes["d"] == w.sizes["e"] and w.chance(8):
        # PyTorch's own kernels for the CPU do not keep NaN in q apart.
        second = w.let("scores", f"{out}.nan_to_num() @ {k}.mT")
        if w.hidden_once:
            w.set(second, f"{second}.masked_fill(~{w.hidden_once[-1]}, {INF})")
        out = w.let("out", f"torch.softmax({second}, -1) @ {v}")
    return w.render(result(w, out))


@st.composite
def programs(draw: Callable) -> Program:
    writer = Writer(draw)
    return sdpa(writer) if writer.chance(12) else by_hand(writer)
