"""Linear time-invariant models: S4D, S5, LRU. Continuous in time with a step size of their own, or discrete."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from adjoint.names import named
from adjoint.state_space.discretise import RULES, hippo_normal
from adjoint.state_space.model import Model, complex_normal, log_uniform, pairs


def _legs(states: int) -> Tensor:
    return hippo_normal(2 * states)[0][states:]


def _inverse(states: int) -> Tensor:
    n = torch.arange(states, dtype=torch.float64)
    total = 2 * states
    return torch.complex(torch.full_like(n, -0.5), total / math.pi * (total / (2 * n + 1) - 1))


def _linear(states: int) -> Tensor:
    n = torch.arange(states, dtype=torch.float64)
    return torch.complex(torch.full_like(n, -0.5), math.pi * n)


STARTS = {"legs": _legs, "inverse": _inverse, "linear": _linear}
"""Gu, Gupta, Goel & Ré (2022), arXiv:2206.11893: HiPPO-LegS, equations 8 and 9; one of each conjugate pair."""


class S4D(Model):
    """For each feature a system of its own, dx/dt = A x + B u, y = 2 Re(C x) + D u, A diagonal and complex.

    ``states``: complex ones of each feature, one of each conjugate pair. ``rule``: "zero_order_hold" or "bilinear".
    ``start``: where A starts, "legs" (HiPPO-LegS), "inverse" or "linear". ``dt``: between which step sizes start.
    Source: Gu, Gupta, Goel & Ré (2022), arXiv:2206.11893.
    """

    def __init__(
        self,
        features: int,
        states: int = 32,
        *,
        rule: str = "zero_order_hold",
        start: str = "legs",
        dt: tuple[float, float] = (0.001, 0.1),
    ) -> None:
        super().__init__()
        self.features, self.rule = features, named("rule", rule, RULES)
        a = named("start", start, STARTS)(states).expand(features, states)
        kind = torch.get_default_dtype()
        self.log_decay = nn.Parameter((-a.real).log().to(kind))
        self.frequency = nn.Parameter(a.imag.to(kind))
        self.b = pairs(torch.ones_like(a))
        self.c = pairs(complex_normal(features, states) / math.sqrt(2))
        self.d = nn.Parameter(torch.randn(features))
        self.log_dt = nn.Parameter(log_uniform(*dt, features))

    def start(self, batch: int) -> Tensor:
        return torch.view_as_complex(self.b).new_zeros((batch, *self.log_decay.shape))

    def system(self) -> tuple[Tensor, Tensor]:
        """A and B of one step, (features, states)."""
        a = torch.complex(-self.log_decay.exp(), self.frequency)
        return self.rule(a, torch.view_as_complex(self.b), self.log_dt.exp().unsqueeze(-1))

    def coefficients(self, u: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.system()
        return a[None, None], b * u.unsqueeze(-1)

    def read(self, h: Tensor, u: Tensor) -> Tensor:
        return 2 * (h * torch.view_as_complex(self.c)).sum(-1).real + self.d * u


class S5(Model):
    """One system for all features, dx/dt = A x + B u, y = 2 Re(C x) + D u, with a step size for each state.

    ``states``: complex ones, of each conjugate pair one; A starts as the normal part of HiPPO-LegS, B and C as random
    matrices in its eigenvectors. Source: Smith, Warrington & Linderman (2023), arXiv:2208.04933, section 3 and
    appendix B.
    """

    def __init__(
        self,
        features: int,
        states: int = 32,
        *,
        rule: str = "zero_order_hold",
        dt: tuple[float, float] = (0.001, 0.1),
    ) -> None:
        super().__init__()
        self.features, self.rule = features, named("rule", rule, RULES)
        a, vectors = hippo_normal(2 * states)
        a, vectors = a[states:], vectors[:, states:]
        kind = torch.get_default_dtype()
        b = torch.randn(2 * states, features, dtype=torch.float64) / math.sqrt(features)
        c = torch.randn(features, 2 * states, dtype=torch.float64) / math.sqrt(2 * states)
        self.log_decay = nn.Parameter((-a.real).log().to(kind))
        self.frequency = nn.Parameter(a.imag.to(kind))
        self.b = pairs(vectors.mH @ b.to(vectors.dtype))
        self.c = pairs(c.to(vectors.dtype) @ vectors)
        self.d = nn.Parameter(torch.randn(features))
        self.log_dt = nn.Parameter(log_uniform(*dt, states))

    def start(self, batch: int) -> Tensor:
        return torch.view_as_complex(self.b).new_zeros((batch, len(self.log_decay)))

    def system(self) -> tuple[Tensor, Tensor]:
        """A (states,) and B (states, features) of one step."""
        a = torch.complex(-self.log_decay.exp(), self.frequency).unsqueeze(-1)
        a, b = self.rule(a, torch.view_as_complex(self.b), self.log_dt.exp().unsqueeze(-1))
        return a.squeeze(-1), b

    def coefficients(self, u: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.system()
        return a[None, None], u.to(b.dtype) @ b.T

    def read(self, h: Tensor, u: Tensor) -> Tensor:
        return 2 * (h @ torch.view_as_complex(self.c).T).real + self.d * u


class LRU(Model):
    """x_{k+1} = lam x_k + gamma B u_k, y = Re(C x) + D u, with lam = exp(-exp(nu) + i exp(theta)) inside the unit circle.

    lam starts evenly on the ring between the radii ``ring``, with angles up to ``angle``; gamma = sqrt(1 - |lam|^2) at the
    start keeps the size of states. Source: Orvieto et al. (2023), arXiv:2303.06349, section 3 and appendix A.
    """

    def __init__(
        self,
        features: int,
        states: int = 64,
        *,
        ring: tuple[float, float] = (0.9, 0.999),
        angle: float = math.pi / 10,
    ) -> None:
        super().__init__()
        if not 0 < ring[0] <= ring[1] < 1:
            raise ValueError(f"ring={ring} are not radii inside the unit circle; give two numbers such as (0.9, 0.999)")
        self.features = features
        square = ring[0] ** 2 + torch.rand(states) * (ring[1] ** 2 - ring[0] ** 2)
        self.nu = nn.Parameter((-0.5 * square.log()).log())
        self.theta = nn.Parameter((angle * torch.rand(states).clamp(min=1e-6)).log())
        self.log_gamma = nn.Parameter((1 - square).sqrt().log())
        self.b = pairs(complex_normal(states, features) / math.sqrt(2 * features))
        self.c = pairs(complex_normal(features, states) / math.sqrt(states))
        self.d = nn.Parameter(torch.randn(features))

    def start(self, batch: int) -> Tensor:
        return torch.view_as_complex(self.b).new_zeros((batch, len(self.nu)))

    def system(self) -> tuple[Tensor, Tensor]:
        """lam (states,) and gamma B (states, features)."""
        lam = torch.exp(torch.complex(-self.nu.exp(), self.theta.exp()))
        return lam, self.log_gamma.exp().unsqueeze(-1) * torch.view_as_complex(self.b)

    def coefficients(self, u: Tensor) -> tuple[Tensor, Tensor]:
        lam, b = self.system()
        return lam[None, None], u.to(b.dtype) @ b.T

    def read(self, h: Tensor, u: Tensor) -> Tensor:
        return (h @ torch.view_as_complex(self.c).T).real + self.d * u
