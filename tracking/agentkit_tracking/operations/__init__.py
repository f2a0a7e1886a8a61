"""What an operator wants to know of the run log: small frames of figures, each with its n and its interval.

    with RunLog().connection() as opened:      # one moment for all figures
        page = operations.look(opened, Filter(system="support_triage", since=monday))
    page.headline, page.rates, page.latency, …

A run counts once: one that another run called is part of that one's figures. Rehearsals (evaluation, chaos, replay) are left
out unless they are asked for. What runs cost is USD, times are seconds, rates lie between 0 and 1.
"""

from __future__ import annotations

from agentkit_tracking.operations.drift import Drift, drift_of, input_drift, route_drift, routes_expected
from agentkit_tracking.operations.filters import Filter
from agentkit_tracking.operations.intervals import fieller, wilson
from agentkit_tracking.operations.page import Page, choices, look
from agentkit_tracking.operations.queries import unfinished

__all__ = [
    "Drift",
    "Filter",
    "Page",
    "choices",
    "drift_of",
    "fieller",
    "input_drift",
    "look",
    "route_drift",
    "routes_expected",
    "unfinished",
    "wilson",
]
