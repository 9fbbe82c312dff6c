"""Runge-Kutta coefficients as data, each with its source: a new method is one more constant, and a line in METHODS."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction as F
from functools import cached_property

Number = float | F


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method: k_i = f(t + c_i h, y + h sum_j a_ij k_j), y_new = y + h sum_i b_i k_i.

    ``error`` (b minus the embedded weights) makes it adaptive. ``dense[i]`` are the coefficients of
    b_i(theta) = sum_m dense[i][m] theta^(m+1) of the interpolant y + h sum_i b_i(theta) k_i.
    """

    name: str
    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    source: str
    error: tuple[float, ...] | None = None
    error_order: int = 0
    """Order of the embedded solution: the step is controlled with exponent 1 / (error_order + 1)."""
    dense: tuple[tuple[float, ...], ...] | None = None
    dense_order: int = 0

    def __post_init__(self) -> None:
        stages = len(self.b)
        assert len(self.c) == len(self.a) == stages, self.name
        assert all(len(row) == i for i, row in enumerate(self.a)), self.name
        assert self.error is None or len(self.error) == stages, self.name
        assert self.dense is None or len(self.dense) == stages, self.name
        for c, row in zip(self.c, self.a, strict=True):
            assert abs(c - sum(row)) < 1e-12, f"{self.name}: c is not the row sum of a"
        assert abs(sum(self.b) - 1) < 1e-12, f"{self.name}: b does not sum to one"

    @cached_property
    def stages(self) -> int:
        return len(self.b)

    @property
    def adaptive(self) -> bool:
        return self.error is not None

    @cached_property
    def weighted(self) -> int:
        """Stages that the new state needs; the rest serve the error estimate and the interpolant."""
        return max(i for i, b in enumerate(self.b) if b != 0) + 1

    @cached_property
    def interpolated(self) -> int:
        """Stages that the interpolant needs."""
        assert self.dense is not None
        return max((i for i, row in enumerate(self.dense) if any(row)), default=0) + 1

    @cached_property
    def first_same_as_last(self) -> bool:
        """Whether the last stage is f at the new state, and so the first stage of the next step."""
        return self.b[-1] == 0 and self.c[-1] == 1 and self.a[-1] == self.b[:-1]


def _tableau(name: str, order: int, a: list[list[Number]], b: list[Number], source: str, **more: object) -> Tableau:
    rows = tuple(tuple(float(x) for x in row) for row in a)
    c = tuple(float(sum((F(x) for x in row), F(0))) for row in a)
    return Tableau(name, order, c, rows, tuple(float(x) for x in b), source, **more)  # type: ignore[arg-type]


def _difference(b: list[Number], embedded: list[Number]) -> tuple[float, ...]:
    return tuple(float(F(x) - F(y)) for x, y in zip(b, embedded, strict=True))


def _polynomials(rows: list[list[Number]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(x) for x in row) for row in rows)


def hermite(b: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
    """The cubic through both ends and their slopes, for a method whose last stage is f at the new state.

    b_i(theta) = b_i (3 theta^2 - 2 theta^3) + [i first] (theta - 2 theta^2 + theta^3) + [i last] (theta^3 - theta^2)
    """
    last = len(b) - 1
    return tuple(
        (float(i == 0), 3 * w - 2 * (i == 0) - (i == last), -2 * w + (i == 0) + (i == last)) for i, w in enumerate(b)
    )


def _with_last_slope(
    name: str, order: int, a: list[list[Number]], b: list[Number], source: str, embedded: list[Number] | None = None
) -> Tableau:
    """A method with one more stage, f at the new state, for the sake of its cubic interpolant.

    ``embedded`` are weights of all stages, that one included.
    """
    longer: list[Number] = [*b, 0]
    weights = tuple(float(x) for x in longer)
    more: dict[str, object] = {"dense": hermite(weights), "dense_order": min(order, 3)}
    if embedded is not None:
        more |= {"error": _difference(longer, embedded), "error_order": order - 1}
    return _tableau(name, order, [*a, b], longer, source, **more)


EULER = _with_last_slope("euler", 1, [[]], [1], "Euler (1768)")

MIDPOINT = _with_last_slope("midpoint", 2, [[], [F(1, 2)]], [0, 1], "Runge (1895)")

HEUN2 = _with_last_slope("heun2", 2, [[], [1]], [F(1, 2), F(1, 2)], "Heun (1900): the explicit trapezoid rule")

RALSTON = _with_last_slope("ralston", 2, [[], [F(2, 3)]], [F(1, 4), F(3, 4)], "Ralston (1962), Math. Comp. 16, 431-437")

HEUN3 = _with_last_slope("heun3", 3, [[], [F(1, 3)], [0, F(2, 3)]], [F(1, 4), 0, F(3, 4)], "Heun (1900)")

RK4 = _with_last_slope(
    "rk4",
    4,
    [[], [F(1, 2)], [0, F(1, 2)], [0, 0, 1]],
    [F(1, 6), F(1, 3), F(1, 3), F(1, 6)],
    "Kutta (1901); Hairer, Norsett & Wanner, Solving ODEs I, table II.1.2",
)

RK4_38 = _with_last_slope(
    "rk4_38",
    4,
    [[], [F(1, 3)], [F(-1, 3), 1], [1, -1, 1]],
    [F(1, 8), F(3, 8), F(3, 8), F(1, 8)],
    "Kutta (1901), the 3/8 rule; Hairer, Norsett & Wanner, Solving ODEs I, table II.1.2",
)

ADAPTIVE_HEUN = _with_last_slope(
    "adaptive_heun", 2, [[], [1]], [F(1, 2), F(1, 2)], "Heun (1900), with Euler embedded", embedded=[1, 0, 0]
)

FEHLBERG2 = _with_last_slope(
    "fehlberg2",
    2,
    [[], [F(1, 2)], [F(1, 256), F(255, 256)]],
    [F(1, 512), F(255, 256), F(1, 512)],
    "Fehlberg (1969), NASA TR R-315, RK1(2)",
    embedded=[F(1, 256), F(255, 256), 0, 0],
)

BOSH3 = _with_last_slope(
    "bosh3",
    3,
    [[], [F(1, 2)], [0, F(3, 4)]],
    [F(2, 9), F(1, 3), F(4, 9)],
    "Bogacki & Shampine (1989), Appl. Math. Lett. 2, 321-325",
    embedded=[F(7, 24), F(1, 4), F(1, 3), F(1, 8)],
)

_DOPRI5_B: list[Number] = [F(35, 384), 0, F(500, 1113), F(125, 192), F(-2187, 6784), F(11, 84), 0]


def _dopri5_dense() -> tuple[tuple[float, ...], ...]:
    """Shampine's quartic interpolant, expanded in theta for each stage.

    u(theta) = y + theta (dy + (1-theta) (r3 + theta (r4 + (1-theta) r5))) with dy = h sum b k, r3 = h k1 - dy,
    r4 = dy - h k7 - r3, r5 = h sum d_i k_i: Hairer, Norsett & Wanner I, section II.6, routine CONTD5.
    """
    d = [
        F(-12715105075, 11282082432),
        F(0),
        F(87487479700, 32700410799),
        F(-10690763975, 1880347072),
        F(701980252875, 199316789632),
        F(-1453857185, 822651844),
        F(69997945, 29380423),
    ]
    rows: list[list[Number]] = []
    for i, b in enumerate(F(x) for x in _DOPRI5_B):
        first, last = F(i == 0), F(i == 6)
        r3 = first - b
        r4 = b - last - r3
        r5 = d[i]
        # theta b + theta(1-theta) r3 + theta^2 (1-theta) r4 + theta^2 (1-theta)^2 r5
        rows.append([b + r3, -r3 + r4 + r5, -r4 - 2 * r5, r5])
    return _polynomials(rows)


DOPRI5 = _tableau(
    "dopri5",
    5,
    [
        [],
        [F(1, 5)],
        [F(3, 40), F(9, 40)],
        [F(44, 45), F(-56, 15), F(32, 9)],
        [F(19372, 6561), F(-25360, 2187), F(64448, 6561), F(-212, 729)],
        [F(9017, 3168), F(-355, 33), F(46732, 5247), F(49, 176), F(-5103, 18656)],
        list(_DOPRI5_B[:-1]),
    ],
    _DOPRI5_B,
    "Dormand & Prince (1980), J. Comput. Appl. Math. 6; interpolant: Hairer, Norsett & Wanner I, section II.6",
    error=_difference(
        _DOPRI5_B,
        [F(5179, 57600), 0, F(7571, 16695), F(393, 640), F(-92097, 339200), F(187, 2100), F(1, 40)],
    ),
    error_order=4,
    dense=_dopri5_dense(),
    dense_order=4,
)

_TSIT5_B: list[Number] = [
    0.09646076681806523,
    0.01,
    0.4798896504144996,
    1.379008574103742,
    -3.290069515436081,
    2.324710524099774,
    0,
]


def _tsit5_dense() -> tuple[tuple[float, ...], ...]:
    """The free fourth-order interpolant of Tsitouras (2011), equation block after (4.1), expanded in theta."""

    def quartic(scale: float, root: float, linear: float, constant: float) -> list[Number]:
        """scale theta (theta - root) (theta^2 + linear theta + constant)"""
        return [
            -scale * root * constant,
            scale * (constant - root * linear),
            scale * (linear - root),
            scale,
        ]

    def cubic(scale: float, linear: float, constant: float) -> list[Number]:
        """scale theta^2 (theta^2 + linear theta + constant)"""
        return [0, scale * constant, scale * linear, scale]

    return _polynomials(
        [
            quartic(-1.0530884977290216, 1.3299890189751412, -1.4364028541716351, 0.7139816917074209),
            cubic(0.1017, -2.1966568338249754, 1.2949852507374631),
            cubic(2.490627285651252793, -2.38535645472061657, 1.57803468208092486),
            [
                0,
                *(
                    -16.54810288924490272 * x
                    for x in (
                        1.21712927295533244 * 0.61620406037800089,
                        -(1.21712927295533244 + 0.61620406037800089),
                        1.0,
                    )
                ),
            ],
            [
                0,
                *(
                    47.37952196281928122 * x
                    for x in (
                        1.203071208372362603 * 0.658047292653547382,
                        -(1.203071208372362603 + 0.658047292653547382),
                        1.0,
                    )
                ),
            ],
            [0, *(-34.87065786149660974 * x for x in (1.2 * 0.666666666666666667, -(1.2 + 0.666666666666666667), 1.0))],
            [0, *(2.5 * x for x in (0.6, -1.6, 1.0))],
        ]
    )


TSIT5 = Tableau(
    "tsit5",
    5,
    (0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
    (
        (),
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
        tuple(float(b) for b in _TSIT5_B[:-1]),
    ),
    tuple(float(b) for b in _TSIT5_B),
    "Tsitouras (2011), Comput. Math. Appl. 62, 770-775",
    error=(
        -0.00178001105222577714,
        -0.0008164344596567469,
        0.007880878010261995,
        -0.1447110071732629,
        0.5823571654525552,
        -0.45808210592918697,
        0.015151515151515152,
    ),
    error_order=4,
    dense=_tsit5_dense(),
    dense_order=4,
)


_DOPRI8_ROWS = (
    "",
    "1/18",
    "1/48 1/16",
    "1/32 0 3/32",
    "5/16 0 -75/64 75/64",
    "3/80 0 0 3/16 3/20",
    "29443841/614563906 0 0 77736538/692538347 -28693883/1125000000 23124283/1800000000",
    "16016141/946692911 0 0 61564180/158732637 22789713/633445777 545815736/2771057229 -180193667/1043307555",
    "39632708/573591083 0 0 -433636366/683701615 -421739975/2616292301 100302831/723423059 "
    "790204164/839813087 800635310/3783071287",
    "246121993/1340847787 0 0 -37695042795/15268766246 -309121744/1061227803 -12992083/490766935 "
    "6005943493/2108947869 393006217/1396673457 123872331/1001029789",
    "-1028468189/846180014 0 0 8478235783/508512852 1311729495/1432422823 -10304129995/1701304382 "
    "-48777925059/3047939560 15336726248/1032824649 -45442868181/3398467696 3065993473/597172653",
    "185892177/718116043 0 0 -3185094517/667107341 -477755414/1098053517 -703635378/230739211 "
    "5731566787/1027545527 5232866602/850066563 -4093664535/808688257 3962137247/1805957418 "
    "65686358/487910083",
    "403863854/491063109 0 0 -5068492393/434740067 -411421997/543043805 652783627/914296604 "
    "11173962825/925320556 -13158990841/6184727034 3936647629/1978049680 -160528059/685178525 "
    "248638103/1413531060 0",
    "14005451/335480064 0 0 0 0 -59238493/1068277825 181606767/758867731 561292985/797845732 "
    "-1041891430/1371343529 760417239/1151165299 118820643/751138087 -528747749/2220607170 1/4",
)

_DOPRI8_EMBEDDED = (
    "13451932/455176623 0 0 0 0 -808719846/976000145 1757004468/5645159321 656045339/265891186 "
    "-3867574721/1518517206 465885868/322736535 53011238/667516719 2/45 0 0"
)

_DOPRI8_DENSE = (
    "1 -6.6910181737837595697 19.999006933368397061 "
    "-30.0610568289666450593 22.1396504998094068976 -6.3448349392860401388",
    "0 0 0 0 0 0",
    "0 0 0 0 0 0",
    "0 0 0 0 0 0",
    "0 0 0 0 0 0",
    "0 -7.6142658045872677172 52.227353279294552405 "
    "-121.4999627731334642623 116.4422149550342161651 -39.6107919852202505218",
    "0 10.7281392630428866124 -46.8919164181093621583 "
    "83.1721004639847717481 -67.1451318825957197185 20.3761213808791436958",
    "0 0.5526637063753648783 -0.1890893225010595467 "
    "9.5724507555993664382 -16.5672243527496524646 7.3347098826795362023",
    "0 4.2186562625665153803 -35.7075975946222072821 "
    "87.8406057677205645007 -89.9916014847245016028 32.8801774352459155182",
    "0 -0.6627209125361597559 6.273644808324035216 "
    "-17.4152107770762969005 22.6237489648532849093 -10.1588990526426760954",
    "0 -1.2636789001135462218 10.3160881272450748458 "
    "-28.5903289514790976966 32.2362340167355370113 -12.54012680987825612",
    "0 5.410603789859042223 -34.7650769866611817349 "
    "81.6630950584341412934 -82.1020315488359848644 29.5553001484516038033",
    "0 -7.0321379067945741781 47.7457971078225540396 "
    "-114.937529137700941817 116.2662185791119533462 -41.7923486424390588923",
    "0 2.3537586759714983486 -19.0082099341608028453 "
    "50.2558364226176017553 -53.9020777466385396792 20.3006925822100825485",
)
"""Coefficients of theta, theta^2, ... of each stage's weight."""


def _dopri8() -> Tableau:
    rows: list[list[Number]] = [[F(x) for x in row.split()] for row in _DOPRI8_ROWS]
    b: list[Number] = [*rows[-1], 0]
    embedded: list[Number] = [F(x) for x in _DOPRI8_EMBEDDED.split()]
    return _tableau(
        "dopri8",
        8,
        rows,
        b,
        "Prince & Dormand (1981), J. Comput. Appl. Math. 7, RK8(7)13M; interpolant of sixth degree as in torchdiffeq",
        error=_difference(b, embedded),
        error_order=7,
        dense=tuple(tuple(float(x) for x in row.split()) for row in _DOPRI8_DENSE),
        dense_order=5,
    )


DOPRI8 = _dopri8()

METHODS: dict[str, Tableau] = {
    tableau.name: tableau
    for tableau in (
        EULER,
        MIDPOINT,
        HEUN2,
        RALSTON,
        HEUN3,
        RK4,
        RK4_38,
        ADAPTIVE_HEUN,
        FEHLBERG2,
        BOSH3,
        DOPRI5,
        TSIT5,
        DOPRI8,
    )
}
