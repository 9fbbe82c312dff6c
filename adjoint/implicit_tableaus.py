"""Implicit Runge-Kutta coefficients, each with its source; a new method is a constant and a line in IMPLICIT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal, localcontext
from fractions import Fraction as F

from adjoint.implicit_tableau import DIGITS, ImplicitTableau, collocation, exact, square, theta_method, with_slopes

BACKWARD_EULER = collocation("backward_euler", 1, [Decimal(1)], "Euler (1768), backwards")
IMPLICIT_MIDPOINT = collocation("implicit_midpoint", 2, [Decimal("0.5")], "Gauss, one stage")
TRAPEZOID = theta_method(0.5, "trapezoid")


def _computed() -> dict[str, ImplicitTableau]:
    """Those whose coefficients hold square roots."""
    found: dict[str, ImplicitTableau] = {}

    def add(tableau: ImplicitTableau) -> None:
        found[tableau.name] = tableau

    with localcontext() as context:
        context.prec = DIGITS
        one = Decimal(1)
        two, three, six, fifteen = (Decimal(n).sqrt() for n in (2, 3, 6, 15))
        alexander = "Alexander (1977), SIAM J. Numer. Anal. 14(6), 1006-1021"
        gamma = 1 - two / 2
        sdirk = collocation("sdirk2", 2, [gamma, one], alexander)
        add(
            ImplicitTableau(
                "sdirk2",
                2,
                sdirk.c,
                square([[gamma], [1 - gamma, gamma]]),
                exact([1 - gamma, gamma]),
                alexander,
                dense=sdirk.dense,
                dense_order=2,
            )
        )
        w, d = two / 4, gamma
        embedded = [(1 - w) / 3, (3 * w + 1) / 3, d / 3]
        hosea = (
            "Bank et al. (1985), IEEE Trans. CAD 4(4); embedded: Hosea & Shampine (1996), Appl. Numer. Math. 20, 21-37"
        )
        add(with_slopes("trbdf2", 2, [[0], [d, d], [w, w, d]], hosea, embedded, error_order=2))
        butcher = "Butcher (1964); Kuntzmann (1961); Hairer & Wanner, Solving ODEs II, table IV.5.1 and 5.2"
        add(collocation("gauss4", 4, [one / 2 - three / 6, one / 2 + three / 6], butcher))
        add(collocation("gauss6", 6, [one / 2 - fifteen / 10, one / 2, one / 2 + fifteen / 10], butcher))
        ehle = "Ehle (1969); Axelsson (1969); Hairer & Wanner, Solving ODEs II, table IV.5.5 and 5.6"
        add(collocation("radau3", 3, [one / 3, one], ehle))
        plain = collocation("radau5", 5, [(4 - six) / 10, (4 + six) / 10, one], ehle)
        found["radau5"] = _radau5(plain)
    return found


def _radau5(plain: ImplicitTableau) -> ImplicitTableau:
    """With the error estimate of Hairer & Wanner II, section IV.8, equations (8.17) to (8.19).

    There err = gamma_0 h f(t, y) + sum_i e_i z_i with z = h A k, to be filtered.
    """
    gamma = 1 / (3 + 3 ** (2 / 3) - 3 ** (1 / 3))
    root = math.sqrt(6)
    e = [gamma / 3 * x for x in (-13 - 7 * root, -13 + 7 * root, -1)]
    error = tuple(sum(e[i] * plain.a[i][j] for i in range(3)) for j in range(3))
    return ImplicitTableau(
        "radau5",
        5,
        plain.c,
        plain.a,
        plain.b,
        plain.source + "; error: section IV.8",
        error=error,
        error_order=3,
        dense=plain.dense,
        dense_order=3,
        filtered=gamma,
    )


def _root(guess: float, coefficients: Sequence[int | F]) -> F:
    """The root near a guess of a polynomial with rational coefficients, the highest first; right to DIGITS digits."""
    x = F(guess)
    for _ in range(6):
        value = slope = F(0)
        for c in coefficients:
            slope, value = slope * x + value, value * x + F(c)
        x = (x - value / slope).limit_denominator(10**DIGITS)
    return x


KVAERNO = "Kvaerno (2004), BIT Numer. Math. 44(3), 489-502"


def _kvaerno3() -> ImplicitTableau:
    g = _root(0.4358665, [1, -3, F(3, 2), F(-1, 6)])
    third = [(-4 * g**2 + 6 * g - 1) / (4 * g), (1 - 2 * g) / (4 * g), g]
    last = [(6 * g - 1) / (12 * g), -1 / ((24 * g - 12) * g), (-6 * g**2 + 6 * g - 1) / (6 * g - 3), g]
    return with_slopes("kvaerno3", 3, [[0], [g, g], third, last], KVAERNO, [*third, 0])


def _kvaerno4() -> ImplicitTableau:
    g = _root(0.5728160625, [1, -4, 3, F(-2, 3), F(1, 24)])

    def p(*coefficients: int) -> F:
        value = F(0)
        for c in coefficients:
            value = value * g + c
        return value

    square = p(12, -6, 1)
    third = [p(144, -180, 81, -15, 1) * g / square**2, p(-36, 39, -15, 2) * g / square**2, g]
    fourth = [
        p(-144, 396, -330, 117, -18, 1) / (12 * g**2 * p(12, -9, 2)),
        p(72, -126, 69, -15, 1) / (12 * g**2 * p(3, -1)),
        p(-6, 6, -1) * square**2 / (12 * g**2 * p(12, -9, 2) * p(3, -1)),
        g,
    ]
    last = [
        p(288, -312, 120, -18, 1) / (48 * g**2 * p(12, -9, 2)),
        p(24, -12, 1) / (48 * g**2 * p(3, -1)),
        -(square**3) / (48 * g**2 * p(3, -1) * p(12, -9, 2) * p(6, -6, 1)),
        p(-24, 36, -12, 1) / p(24, -24, 4),
        g,
    ]
    return with_slopes("kvaerno4", 4, [[0], [g, g], third, fourth, last], KVAERNO, [*fourth, 0])


def _decimals(text: str) -> list[F]:
    return [F(x) for x in text.split()]


def _kvaerno5() -> ImplicitTableau:
    rows = [
        _decimals(x)
        for x in (
            "0",
            "0.26 0.26",
            "0.13 0.84033320996790809 0.26",
            "0.22371961478320505 0.47675532319799699 -0.06470895363112615 0.26",
            "0.16648564323248321 0.10450018841591720 0.03631482272098715 -0.13090704451073998 0.26",
            "0.13855640231268224 0 -0.04245337201752043 0.02446657898003141 0.61943039072480676 0.26",
            "0.13659751177640291 0 -0.05496908796538376 -0.04118626728321046 0.62993304899016403 0.06962479448202728 0.26",
        )
    ]
    return with_slopes("kvaerno5", 5, rows, KVAERNO, [*rows[-2], 0])


KENCARP = "Kennedy & Carpenter (2003), Appl. Numer. Math. 44, 139-181"


def _kencarp(order: int, implicit: Sequence[str], explicit: Sequence[str], embedded: str) -> ImplicitTableau:
    rows, own = ([_decimals(x) for x in part] for part in (implicit, explicit))
    return with_slopes(f"kencarp{order}", order, rows, KENCARP, _decimals(embedded), own)


KENCARP3 = _kencarp(
    3,
    (
        "0",
        "1767732205903/4055673282236 1767732205903/4055673282236",
        "2746238789719/10658868560708 -640167445237/6845629431997 1767732205903/4055673282236",
        "1471266399579/7840856788654 -4482444167858/7529755066697 11266239266428/11593286722821 "
        "1767732205903/4055673282236",
    ),
    (
        "0",
        "1767732205903/2027836641118",
        "5535828885825/10492691773637 788022342437/10882634858940",
        "6485989280629/16251701735622 -4246266847089/9704473918619 10755448449292/10357097424841",
    ),
    "2756255671327/12835298489170 -10771552573575/22201958757719 9247589265047/10645013368117 "
    "2193209047091/5459859503100",
)

KENCARP4 = _kencarp(
    4,
    (
        "0",
        "1/4 1/4",
        "8611/62500 -1743/31250 1/4",
        "5012029/34652500 -654441/2922500 174375/388108 1/4",
        "15267082809/155376265600 -71443401/120774400 730878875/902184768 2285395/8070912 1/4",
        "82889/524892 0 15625/83664 69875/102672 -2260/8211 1/4",
    ),
    (
        "0",
        "1/2",
        "13861/62500 6889/62500",
        "-116923316275/2393684061468 -2731218467317/15368042101831 9408046702089/11113171139209",
        "-451086348788/2902428689909 -2682348792572/7519795681897 12662868775082/11960479115383 "
        "3355817975965/11060851509271",
        "647845179188/3216320057751 73281519250/8382639484533 552539513391/3454668386233 "
        "3354512671639/8306763924573 4040/17871",
    ),
    "4586570599/29645900160 0 178811875/945068544 814220225/1159782912 -3700637/11593932 61727/225920",
)

# a_76 is usually given as -4269925059573/7827059040719, which misses the row sum by 2e-12; here the row sums decide.
KENCARP5 = _kencarp(
    5,
    (
        "0",
        "41/200 41/200",
        "41/400 -567603406766/11931857230679 41/200",
        "683785636431/9252920307686 0 -110385047103/1367015193373 41/200",
        "3016520224154/10081342136671 0 30586259806659/12414158314087 -22760509404356/11113319521817 41/200",
        "218866479029/1489978393911 0 638256894668/5436446318841 -1179710474555/5321154724896 "
        "-60928119172/8023461067671 41/200",
        "1020004230633/5715676835656 0 25762820946817/25263940353407 -2161375909145/9755907335909 "
        "-211217309593/5846859502534 -4710367281160/8634419175717 41/200",
        "-872700587467/9133579230613 0 0 22348218063261/9555858737531 -1143369518992/8141816002931 "
        "-39379526789629/19018526304540 32727382324388/42900044865799 41/200",
    ),
    (
        "0",
        "41/100",
        "367902744464/2072280473677 677623207551/8224143866563",
        "1268023523408/10340822734521 0 1029933939417/13636558850479",
        "14463281900351/6315353703477 0 66114435211212/5879490589093 -54053170152839/4284798021562",
        "14090043504691/34967701212078 0 15191511035443/11219624916014 -18461159152457/12425892160975 "
        "-281667163811/9011619295870",
        "19230459214898/13134317526959 0 21275331358303/2942455364971 -38145345988419/4862620318723 -1/8 -1/8",
        "-19977161125411/11928030595625 0 -40795976796054/6384907823539 177454434618887/12078138498510 "
        "782672205425/8267701900261 -69563011059811/9646580694205 7356628210526/4942186776405",
    ),
    "-975461918565/9796059967033 0 0 78070527104295/32432590147079 -548382580838/3424219808633 "
    "-33438840321285/15594753105479 3629800801594/4656183773603 4035322873751/18575991585200",
)

IMPLICIT: dict[str, ImplicitTableau] = {
    tableau.name: tableau
    for tableau in (
        BACKWARD_EULER,
        IMPLICIT_MIDPOINT,
        TRAPEZOID,
        *_computed().values(),
        _kvaerno3(),
        _kvaerno4(),
        _kvaerno5(),
        KENCARP3,
        KENCARP4,
        KENCARP5,
    )
}
