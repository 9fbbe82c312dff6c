"""Rosenbrock coefficients as data, each with its source, in the form that needs no product with the Jacobian.

    M (k_i / gamma - sum_j c_ij k_j) - h J k_i = f(t + alpha_i h, y + h sum_j a_ij k_j) + d_i h f_t
    y_new = y + h sum_i b_i k_i

with J = df/dy at (t, y): Hairer & Wanner, Solving ODEs II, section IV.7, equation (7.25), k = u / h. Theirs is
Gamma = (1/gamma - C)^-1, alpha = a Gamma, weights b Gamma.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

Row = tuple[float, ...]


@dataclass(frozen=True)
class RosenbrockTableau:
    """``a`` and ``coupling`` (c_ij) are strictly lower triangular; ``error`` and ``dense`` as in other tables."""

    name: str
    order: int
    gamma: float
    a: tuple[Row, ...]
    coupling: tuple[Row, ...]
    b: Row
    source: str
    error: Row | None
    error_order: int
    dense: tuple[Row, ...]
    dense_order: int

    filtered = 0.0
    explicit = None
    coupled = starts_explicitly = carries = first_same_as_last = False

    def __post_init__(self) -> None:
        stages = len(self.b)
        for rows in (self.a, self.coupling):
            assert len(rows) == stages and all(len(row) == i for i, row in enumerate(rows)), self.name
        assert len(self.dense) == stages and (self.error is None or len(self.error) == stages), self.name

    @property
    def stages(self) -> int:
        return len(self.b)

    weighted = interpolated = stages

    @property
    def adaptive(self) -> bool:
        return self.error is not None

    @property
    def ends_at_last(self) -> bool:
        """Whether the last stage only corrects the new state: its slope is the error."""
        return self.error == (*[0.0] * (self.stages - 1), 1.0)

    @property
    def inverse(self) -> tuple[Row, ...]:
        """Gamma, lower triangular with its diagonal: of (1/gamma - C)."""
        rows: list[Row] = []
        for i, row in enumerate(self.coupling):
            below = [self.gamma * sum(row[k] * rows[k][j] for k in range(j, i)) for j in range(i)]
            rows.append((*below, self.gamma))
        return tuple(rows)

    @property
    def c(self) -> Row:
        """alpha_i: the row sums of a Gamma."""
        sums = [sum(row) for row in self.inverse]
        return tuple(_near(sum(x * s for x, s in zip(row, sums, strict=False))) for row in self.a)

    @property
    def d(self) -> Row:
        """gamma_i: the row sums of Gamma."""
        return tuple(sum(row) for row in self.inverse)


def _near(c: float) -> float:
    """A node that is 0 or 1 but for rounding is an end of the step."""
    return float(round(c)) if abs(c - round(c)) < 1e-12 else c


def _rodas(name: str, order: int, gamma: float, a: str, c: str, h: str, source: str) -> RosenbrockTableau:
    """A stiffly accurate method: its last stages are corrections of the state before, the last of all is the error.

    The interpolant is y + theta (y_new - y + (1 - theta) (h_1 + theta (h_2 + ..))): section VI.4 of the book.
    """
    rows = [tuple(float(x) for x in row.split()) for row in ("", *a.split("\n"))]
    coupling = [tuple(float(x) for x in row.split()) for row in ("", *c.split("\n"))]
    b = rows[-1]
    for _ in range(len(coupling) - len(rows)):
        b = (*b, 1.0)
        rows.append(b)
    b = (*b, 1.0)
    columns = [tuple(float(x) for x in row.split()) for row in h.split("\n")]
    columns = [(*x, *[0.0] * (len(b) - len(x))) for x in columns]
    dense = []
    for i, own in enumerate(b):
        terms = [x[i] for x in columns]
        dense.append((own + terms[0], *(y - x for x, y in pairwise(terms)), -terms[-1]))
    error = (*[0.0] * (len(b) - 1), 1.0)
    return RosenbrockTableau(
        name, order, gamma, tuple(rows), tuple(coupling), b, source, error, order - 1, tuple(dense), len(columns) + 1
    )


def _ros3p() -> RosenbrockTableau:
    """With an interpolant of order two: theta^2 b + (theta - theta^2) e, sum e_i = 1 and sum e_i beta_i = 0."""
    gamma = 0.5 + math.sqrt(3) / 6
    g = 1 / gamma
    second = -g * (2 - g / 2)
    coupling: tuple[Row, ...] = ((), (-g * g,), (-g * (1 - second), second))
    middle = g * (2 / 3 - g / 6)
    b = (g * (1 + middle), middle, g / 3)
    embedded = (2.113248654051871, 1.0, 0.4226497308103742)
    last = 1 - 0.5 - math.sqrt(3) / 3  # beta_3
    e_1, e_3 = -last / (gamma - last), gamma / (gamma - last)
    e = (g * e_1 - e_3 * coupling[2][0], -e_3 * coupling[2][1], g * e_3)
    return RosenbrockTableau(
        "ros3p",
        3,
        gamma,
        ((), (g,), (g, 0.0)),
        coupling,
        b,
        "Lang & Verwer (2001), BIT Numer. Math. 41(4), 731-738",
        tuple(x - y for x, y in zip(b, embedded, strict=True)),
        2,
        tuple((x, y - x) for x, y in zip(e, b, strict=True)),
        2,
    )


ROSENBROCK: dict[str, RosenbrockTableau] = {
    tableau.name: tableau
    for tableau in (
        _ros3p(),
        _rodas(
            "rodas4",
            4,
            0.25,
            "1.544\n"
            "0.9466785280815826 0.2557011698983284\n"
            "3.314825187068521 2.896124015972201 0.9986419139977817\n"
            "1.221224509226641 6.019134481288629 12.53708332932087 -0.687886036105895",
            "-5.6688\n"
            "-2.430093356833875 -0.2063599157091915\n"
            "-0.1073529058151375 -9.594562251023355 -20.47028614809616\n"
            "7.496443313967647 -10.24680431464352 -33.99990352819905 11.7089089320616\n"
            "8.083246795921522 -7.981132988064893 -31.52159432874371 16.31930543123136 -6.058818238834054",
            "10.12623508344586 -7.487995877610167 -34.80091861555747 -7.992771707568823 1.025137723295662\n"
            "-0.6762803392801253 6.087714651680015 16.43084320892478 24.76722511418386 -6.594389125716872",
            "Hairer & Wanner, Solving ODEs II (1996), section VI.4, code RODAS",
        ),
        _rodas(
            "rodas5p",
            5,
            0.21193756319429014,
            "3.0\n"
            "2.849394379747939 0.45842242204463923\n"
            "-6.954028509809101 2.489845061869568 -10.358996098473584\n"
            "2.8029986275628964 0.5072464736228206 -0.3988312541770524 -0.04721187230404641\n"
            "-7.502846399306121 2.561846144803919 -11.627539656261098 -0.18268767659942256 0.030198172008377946",
            "-14.155112264123755\n"
            "-17.97296035885952 -2.859693295451294\n"
            "147.12150275711716 -1.41221402718213 71.68940251302358\n"
            "165.43517024871676 -0.4592823456491126 42.90938336958603 -5.961986721573306\n"
            "24.854864614690072 -3.0009227002832186 47.4931110020768 5.5814197821558125 -0.6610691825249471\n"
            "30.91273214028599 -3.1208243349937974 77.79954646070892 34.28646028294783 -19.097331116725623 "
            "-28.087943162872662\n"
            "37.80277123390563 -3.2571969029072276 112.26918849496327 66.9347231244047 -40.06618937091002 "
            "-54.66780262877968 -9.48861652309627",
            "25.948786856663858 -2.5579724845846235 10.433815404888879 -2.3679251022685204 0.524948541321073 "
            "1.1241088310450404 0.4272876194431874 -0.17202221070155493\n"
            "-9.91568850695171 -0.9689944594115154 3.0438037242978453 -24.495224566215796 20.176138334709044 "
            "15.98066361424651 -6.789040303419874 -6.710236069923372\n"
            "11.419903575922262 2.8879645146136994 72.92137995996029 80.12511834622643 -52.072871366152654 "
            "-59.78993625266729 -0.15582684282751913 4.883087185713722",
            "Steinebach (2023), BIT Numer. Math. 63, 27",
        ),
    )
}
