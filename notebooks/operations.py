import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="Operations")

with app.setup:
    import time
    from datetime import UTC, datetime, timedelta

    import altair as alt
    import marimo as mo
    import polars as pl

    from agentkit.errors import AgentkitError
    from agentkit.examples import read_examples
    from agentkit.settings import Price, load_settings
    from agentkit_pipelines.evidence import find_golden
    from agentkit_tracking import costs, operations
    from agentkit_tracking.control.card import prose
    from agentkit_tracking.runlog import RunLog, events

    BLUE, ORANGE, GREEN, RED, GREY, PURPLE = "#2563eb", "#f59e0b", "#059669", "#dc2626", "#94a3b8", "#7c3aed"
    WINDOWS = {"24 hours": 1, "7 days": 7, "30 days": 30, "90 days": 90, "all": None}
    DRAFT = "draft"


@app.cell(hide_code=True)
def _():
    refresh = mo.ui.refresh(options=["1m", "10m"])
    mo.vstack(
        [
            mo.hstack([mo.md("# Operations"), refresh], align="center"),
            mo.md(
                "What the run log says of the agents at work: what a success costs, how long it takes, what fails, where "
                "people step in. A run counts once, with all that it called; evaluations, chaos runs and replays are left "
                "out unless you ask for them. Bands and whiskers are 95 % intervals; times are UTC."
            ),
        ]
    )
    return (refresh,)


@app.cell(hide_code=True)
def _(refresh):
    refresh.value
    try:
        with RunLog().connection() as _opened:
            found = operations.choices(_opened)
            began = operations.unfinished(_opened, operations.Filter())
        _said = (
            mo.callout(
                mo.md(
                    "**The run log has no finished run yet.** Run something and come back: `agentkit run notebooks/"
                    'support_triage.py "I was charged twice"`, or `make demo` for a whole road of versions. This page '
                    f"looks in `{prose(str(RunLog().folder), 200)}`; another log is another `AGENTKIT_HOME`."
                    + (f" {began} runs are under way or were broken off." if began else "")
                ),
                kind="neutral",
            )
            if found.is_empty()
            else None
        )
    except AgentkitError as e:
        found = None
        _said = mo.callout(
            mo.md(f"**The run log cannot be read:** {prose(str(e), 400)} Press the round arrow above to try again."),
            kind="danger",
        )
    mo.stop(found is None or found.is_empty(), _said)
    return (found,)


@app.cell(hide_code=True)
def _(found):
    # Made anew only when there are other systems or stages: what is chosen stays while the log grows.
    # No name has a space, so none is like the option for all of them.
    system = mo.ui.dropdown(
        options={**{name: name for name in found["system"].unique().sort()}, "all systems": None},
        value="all systems",
        label="System",
    )
    stage = mo.ui.dropdown(
        options={**{name: name for name in found["stage"].drop_nulls().unique().sort()}, "all stages": None},
        value="all stages",
        label="Stage",
    )
    window = mo.ui.dropdown(options=list(WINDOWS), value="30 days", label="Time")
    rehearsals = mo.ui.checkbox(label="also evaluations")
    return rehearsals, stage, system, window


@app.function
def named(system, release, *, whole=False):
    """How a version is called on this page."""
    short = release[:8] if release else DRAFT
    return f"{system} · {short}" if whole else short


@app.cell(hide_code=True)
def _(found, system):
    _rows = found if system.value is None else found.filter(pl.col("system") == system.value)
    _versions = _rows.group_by("system", "release").agg(pl.col("last").max()).sort("last", descending=True)
    version = mo.ui.dropdown(
        options={
            "all versions": None,
            **{
                named(s, r, whole=system.value is None): (s, r) for s, r in _versions.select("system", "release").rows()
            },
        },
        value="all versions",
        label="Version",
    )
    return (version,)


@app.cell(hide_code=True)
def _(rehearsals, stage, system, version, window):
    mo.hstack([system, version, stage, window, rehearsals], justify="start", align="center", wrap=True, gap=1.5)
    return


@app.cell(hide_code=True)
def _(refresh, rehearsals, stage, system, version, window):
    refresh.value
    _until = datetime.now(UTC)
    _days = WINDOWS[window.value]
    _of, _release = version.value or (system.value, None)
    chosen = operations.Filter(
        system=_of,
        release=_release,
        stage=stage.value,
        since=None if _days is None else _until - timedelta(days=_days),
        until=None if _days is None else _until,
        rehearsals=rehearsals.value,
    )
    _began = time.perf_counter()
    try:
        with RunLog().connection() as _opened:
            page = operations.look(_opened, chosen)
        took = time.perf_counter() - _began
        _said = (
            None
            if page.runs
            else mo.callout(mo.md("**No finished run meets this choice.** Widen it above."), kind="neutral")
        )
    except AgentkitError as e:
        page, _said = None, mo.callout(mo.md(f"**The run log cannot be read:** {prose(str(e), 400)}"), kind="danger")
    mo.stop(_said is not None, _said)
    mo.md(
        f"As of {_until:%Y-%m-%d %H:%M} UTC · **{page.runs:,}** finished runs"
        + (f", {page.unfinished:,} under way or broken off" if page.unfinished else "")
        + f" · read in {took:.2f} s"
    )
    return chosen, page


@app.function
def usd(value):
    """Dollars, as many digits as say something."""
    if value is None:
        return "unknown"
    return f"${value:,.0f}" if value >= 100 else f"${value:.2f}" if value >= 1 else f"${value:.2g}" if value else "$0"


@app.function
def span(seconds):
    """Seconds as people say them."""
    if seconds is None:
        return "–"
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size * 1.5:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds >= 0.1 else f"{seconds * 1000:.0f} ms"


@app.function
def share(value):
    """A rate in per cent, with a digit where it is small."""
    return "–" if value is None else f"{value:.1%}" if value < 0.995 else f"{value:.2%}"


@app.cell(hide_code=True)
def _(page):
    _cards = (
        ("success", "Success", share, "increase"),
        ("cost per success", "Cost per success", usd, "decrease"),
        ("p95", "95 % of runs within", span, "decrease"),
        ("recovery", "Recovered after a failed call", share, "increase"),
        ("escalation", "Handed to a person", share, "decrease"),
        ("refusal", "Stopped by a rule", share, "decrease"),
        ("completion", "Goal reached, nobody objected", share, "increase"),
        ("rating", "Rating, 1 to 5", lambda v: f"{v:.2f}", "increase"),
    )
    _rows = {row["figure"]: row for row in page.headline.iter_rows(named=True)}

    def _card(figure, label, shown, better):
        row = _rows.get(figure)
        if row is None or row["value"] is None:
            return mo.stat("–", label=label, caption="nothing to count", bordered=True)
        said = [] if row["low"] is None else [f"{shown(row['low'])} to {shown(row['high'])}"]
        if row["n"] != page.runs:
            said.append(f"n {row['n']:,}")
        before = row["before"]
        if before is not None:
            said.append(f"before {shown(before)}")
        direction = ("increase" if row["value"] > before else "decrease") if row["is_changed"] else None
        return mo.stat(
            shown(row["value"]),
            label=label,
            caption=" · ".join(said),
            direction=direction,
            target_direction=better,
            bordered=True,
        )

    _made = [_card(*card) for card in _cards]
    mo.vstack(
        [
            mo.Html(
                '<div style="display:grid;grid-template-columns:repeat(4,minmax(0,1fr));gap:0.75rem">'
                + "".join(card.text for card in _made)
                + "</div>"
            ),
            mo.md(
                "An arrow stands where this time's interval and that of as long a time before do not overlap."
                if page.chosen.since
                else "Choose a time above to compare with the time before it."
            ),
        ],
        gap=0.75,
    )
    return


@app.function
def values(frame):
    """Rows for a chart, inside its own text: nothing is fetched."""
    rows = [
        {k: v.isoformat() if isinstance(v, datetime) else v for k, v in row.items()}
        for row in frame.iter_rows(named=True)
    ]
    return alt.Data(values=rows)


@app.function
def finished(chart, title, height=200):
    """A chart as this page shows it."""
    return (
        chart.properties(width="container", height=height, title=title, usermeta={"embedOptions": {"actions": False}})
        .configure_view(strokeWidth=0)
        .configure_title(anchor="start", fontSize=13, fontWeight=600, color="#334155", offset=10)
        .configure_axis(
            grid=True, gridColor="#eef2f7", domain=False, ticks=False, labelColor="#64748b", titleColor="#64748b",
            titleFontWeight="normal", labelPadding=6,
        )
        .configure_legend(orient="bottom", title=None, labelColor="#475569", symbolType="circle", symbolOpacity=1, labelLimit=260)
    )  # fmt: skip


@app.function
def over_time():
    """The time axis of all charts."""
    axis = alt.Axis(grid=False, labelOverlap=True, tickCount=6, format="%d %b")
    return alt.X("at:T", title=None, scale=alt.Scale(type="utc", padding=6), axis=axis)


@app.function
def lines(frame, *, y, title, color=None, colors=None, axis=None, low="low", high="high", zero=True, tooltip=()):
    """Values over time as lines, with a band where there is an interval."""
    x = over_time()
    scale = alt.Scale(zero=zero, nice=True)
    shown = alt.Y(f"{y}:Q", title=None, scale=scale, axis=axis or alt.Axis(tickCount=5))
    colored = (
        alt.value(BLUE)
        if color is None
        else alt.Color(
            f"{color}:N",
            scale=alt.Scale(domain=list(colors), range=list(colors.values())),
            **({"legend": None} if len(colors) == 1 else {}),
        )
    )
    base = alt.Chart(values(frame)).encode(x=x, color=colored)
    parts = []
    if low in frame.columns:
        band = alt.Y(f"{low}:Q", title=None, scale=scale, axis=axis or alt.Axis(tickCount=5))
        parts.append(base.mark_area(opacity=0.15).encode(y=band, y2=f"{high}:Q"))
    tips = [alt.Tooltip("at:T", title="from", format="%a %d %b %H:%M", formatType="utc"), *tooltip]
    parts.append(
        base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=18, filled=True)).encode(y=shown, tooltip=tips)
    )
    return finished(alt.layer(*parts), title)


@app.function
def stacked(frame, *, bucket, kinds, color, y, title):
    """Counts over time as stacked bars, one for each bucket."""
    order = {kind: place for place, kind in enumerate(kinds)}
    piled = (
        frame.with_columns(pl.col(color).replace_strict(order, return_dtype=pl.Int64).alias("place"))
        .sort("at", "place")
        .with_columns(
            (pl.col("at") + pl.duration(seconds=int(bucket * 0.86))).alias("until"),
            pl.col(y).cum_sum().over("at").alias("top"),
        )
        .with_columns((pl.col("top") - pl.col(y)).alias("bottom"))
    )
    return finished(
        alt.Chart(values(piled))
        .mark_bar()
        .encode(
            x=over_time(),
            x2="until:T",
            y=alt.Y("bottom:Q", title=None, axis=alt.Axis(tickCount=5, format="~s"), scale=alt.Scale(zero=True)),
            y2="top:Q",
            color=alt.Color(f"{color}:N", scale=alt.Scale(domain=list(kinds), range=list(kinds.values()))),
            tooltip=[
                alt.Tooltip("at:T", title="from", format="%a %d %b %H:%M", formatType="utc"),
                alt.Tooltip(f"{color}:N"),
                alt.Tooltip(f"{y}:Q", format=","),
            ],
        ),
        title,
    )


@app.function
def whiskers(frame, *, name, value, title, axis, tooltip=(), color=BLUE):
    """One value a row with its interval."""
    rows = values(frame)
    y = alt.Y(f"{name}:N", title=None, sort=None, axis=alt.Axis(grid=False, labelLimit=230, labelPadding=8))
    base = alt.Chart(rows).encode(y=y)
    least, most = frame["low"].min(), frame["high"].max()
    wide = least is not None and most is not None and 0 < least * 50 < most  # else the cheap ones cannot be told apart
    scale = alt.Scale(type="log") if wide else alt.Scale(zero=True)
    if wide:
        axis = alt.Axis(**{**axis.to_dict(), "values": [10.0**n for n in range(-7, 4)]})
    x = alt.X(f"{value}:Q", title=None, axis=axis, scale=scale)
    rule = base.mark_rule(strokeWidth=6, opacity=0.2, color=color, strokeCap="round").encode(
        x=alt.X("low:Q", title=None, axis=axis, scale=scale), x2="high:Q"
    )
    point = base.mark_point(filled=True, size=70, opacity=1, color=color).encode(x=x, tooltip=[f"{name}:N", *tooltip])
    return finished(rule + point, title, height=max(70, 30 * frame.height))


@app.function
def beside(*charts):
    """Charts side by side."""
    return mo.hstack(list(charts), widths="equal", gap=1.5)


@app.cell(hide_code=True)
def _(page):
    _whole = page.chosen.system is None
    _order = page.costs_of_versions.with_columns(
        pl.struct("system", "release")
        .map_elements(lambda v: named(v["system"], v["release"], whole=_whole), return_dtype=pl.String)
        .alias("version")
    )
    _dollars = alt.Axis(format="$~g", tickCount=5)
    _tips = [alt.Tooltip("value:Q", title="USD per success", format="$.4g"), alt.Tooltip("runs:Q", format=","),
             alt.Tooltip("successes:Q", format=","), alt.Tooltip("usd:Q", title="USD in all", format="$,.4g")]  # fmt: skip
    _unpriced = int(page.costs["unpriced"].sum())
    mo.vstack(
        [
            mo.md(
                "## What a success costs\n\nAll that runs cost, those that failed included, over the number that succeeded. "
                "It rises when calls get dearer **and** when more runs fail."
                + (
                    f" **{_unpriced:,} runs have no known price** and are left out: add their model to `[prices]` of "
                    "`agentkit.toml`."
                    if _unpriced
                    else ""
                )
            ),
            beside(
                lines(page.costs.drop_nulls("value"), y="value", title="USD per success, over time", axis=_dollars, tooltip=_tips),
                whiskers(_order.drop_nulls("value"), name="version", value="value", title="USD per success, by version",
                         axis=_dollars, tooltip=_tips),
            ),
        ]
    )  # fmt: skip
    return


@app.cell(hide_code=True)
def _(page):
    _percent = alt.Axis(format=".0%", tickCount=5)
    _tips = [alt.Tooltip("figure:N"), alt.Tooltip("value:Q", format=".2%"), alt.Tooltip("hits:Q", format=","),
             alt.Tooltip("n:Q", title="of", format=",")]  # fmt: skip

    def _chart(figures, title, zero=True):
        rows = page.rates.filter(pl.col("figure").is_in(list(figures)))
        return lines(
            rows, y="value", title=title, color="figure", colors=figures, axis=_percent, zero=zero, tooltip=_tips
        )

    mo.vstack(
        [
            mo.md(
                "## Does it work\n\n**Success**: the run ended with a valid result. **Failure**: it ended in an error. "
                "**Refusal**: a policy, a limit or a stop ended it, as it should; refusals are shown apart, and are no "
                "failures here (the monitor's measure `failure` counts both). **Recovery**: of the runs in which a call "
                "failed, those that succeeded all the same. **Escalation**, as the monitor counts it: a person was asked, or the output's "
                "`action` is `escalate` (which is not known of runs that earlier versions logged)."
            ),
            beside(
                _chart({"success": GREEN}, "Success", zero=False),
                _chart({"failure": RED, "refusal": PURPLE}, "Failure and refusal"),
            ),
            beside(
                _chart({"recovery": BLUE}, "Recovery", zero=False),
                _chart({"escalation": ORANGE}, "Escalation"),
            ),
        ]
    )
    return


@app.cell(hide_code=True)
def _(page):
    _wide = page.rates_of_versions.with_columns(
        pl.format(
            "{} ({}–{})", *(pl.col(c).map_elements(share, return_dtype=pl.String) for c in ("value", "low", "high"))
        ).alias("said")
    ).pivot("figure", index=["system", "release"], values="said")
    _latency = page.latency_of_versions.drop_nulls("system").select(
        "system", "release", *(pl.col(c).map_elements(span, return_dtype=pl.String) for c in ("p50", "p95"))
    )
    _cost = page.costs_of_versions.select(
        "system", "release", "runs", pl.col("value").map_elements(usd, return_dtype=pl.String).alias("USD per success")
    )
    _table = _cost.join(_latency, on=["system", "release"], how="left").join(
        _wide, on=["system", "release"], how="left"
    )
    _figures = [
        c for c in ("success", "failure", "refusal", "recovery", "escalation", "completion") if c in _table.columns
    ]
    mo.accordion(
        {
            f"Versions side by side ({_table.height})": mo.ui.table(
                _table.select(
                    "system",
                    pl.col("release").map_elements(lambda r: named("", r), return_dtype=pl.String).alias("version"),
                    "runs", "USD per success", "p50", "p95", *_figures,
                ),
                selection=None, show_column_summaries=False, show_data_types=False, show_download=False,
            ),
            f"Why runs failed ({page.errors.height})": mo.ui.table(
                page.errors, selection=None, show_column_summaries=False, show_data_types=False, show_download=False
            ),
        },
        multiple=True,
    )  # fmt: skip
    return


@app.cell(hide_code=True)
def _(page):
    _phases = {"planning": BLUE, "execution": GREEN, "reflection": PURPLE, "total": "#334155"}
    _axis = alt.Axis(format="~s", labelExpr="datum.label + ' s'", tickCount=5)

    def _chart(quantile, title):
        tips = [
            alt.Tooltip("phase:N"),
            alt.Tooltip(f"{quantile}:Q", title="seconds", format=".3g"),
            alt.Tooltip("n:Q", format=","),
        ]
        rows = page.latency.drop_nulls(quantile)
        return lines(rows, y=quantile, title=title, color="phase", colors=_phases, axis=_axis, tooltip=tips)

    mo.vstack(
        [
            mo.md(
                "## How long it takes\n\nBy phase of the state machine; the total is the whole run without the time a person "
                "took to decide. Half of the runs are within the first, 95 of 100 within the second."
            ),
            beside(_chart("p50", "Median (p50)"), _chart("p95", "95th percentile (p95)")),
        ]
    )
    return


@app.cell(hide_code=True)
def _(page):
    _rows = page.tools
    _top = _rows.filter(pl.col("calls") > 0).head(12)
    _percent = alt.Axis(format=".0%", tickCount=5)
    _tips = [
        alt.Tooltip("system:N"),
        alt.Tooltip("value:Q", title="failed", format=".2%"),
        alt.Tooltip("calls:Q", format=","),
    ]
    _calls = (
        alt.Chart(values(_top))
        .mark_bar(color=BLUE, cornerRadiusEnd=3, height={"band": 0.6})
        .encode(
            y=alt.Y("tool:N", sort=None, title=None, axis=alt.Axis(grid=False, labelLimit=230, labelPadding=8)),
            x=alt.X("calls:Q", title=None, axis=alt.Axis(format="~s", tickCount=5)),
            tooltip=[
                alt.Tooltip("system:N"),
                alt.Tooltip("tool:N"),
                alt.Tooltip("calls:Q", format=","),
                alt.Tooltip("tries:Q", format=","),
            ],
        )
    )
    mo.vstack(
        [
            mo.md(
                "## Tools\n\nCalls that were made, and the share of them that failed for good: what worked on a second try is no "
                "failure, but it counts as a try. Calls that a rule forbade or whose arguments were wrong were not made."
            ),
            beside(
                finished(_calls, "Calls", height=max(70, 30 * _top.height)),
                whiskers(_top, name="tool", value="value", title="Failed calls", axis=_percent, tooltip=_tips, color=RED),
            )
            if _top.height
            else mo.md("*No tool was called.*"),
            mo.accordion(
                {
                    f"All tools ({_rows.height})": mo.ui.table(
                        _rows.select(
                            "system", "tool", "calls", "tries", "failed", "not_made",
                            *(pl.col(c).map_elements(span, return_dtype=pl.String) for c in ("p50", "p95")),
                            pl.col("usd").map_elements(usd, return_dtype=pl.String),
                        ),
                        selection=None, show_column_summaries=False, show_data_types=False, show_download=False,
                    )
                }
            )
            if _rows.height
            else None,
        ]
    )  # fmt: skip
    return


@app.cell(hide_code=True)
def _(page):
    _verdicts = {"approve": GREEN, "modify": ORANGE, "reject": RED, "nobody": GREY, "none": "#cbd5e1"}
    _over_time = page.decisions.drop_nulls("at")
    _present = {k: v for k, v in _verdicts.items() if k in _over_time["verdict"].unique().to_list()}
    _all = page.decisions.filter(pl.col("at").is_null())
    _decided = _all.filter(~pl.col("verdict").is_in(["nobody", "none"]))
    _waits = _over_time.filter(~pl.col("verdict").is_in(["nobody", "none"])).with_columns(
        (pl.col("p50") / 60).alias("minutes")
    )
    _said = "; ".join(
        f"**{row['verdict']}** {row['asked']:,} (half within {span(row['p50'])}, 95 % within {span(row['p95'])})"
        for row in _decided.iter_rows(named=True)
    )
    _nobody = int(_all.filter(pl.col("verdict") == "nobody")["asked"].sum())
    _tips = [
        alt.Tooltip("verdict:N"),
        alt.Tooltip("minutes:Q", title="median, minutes", format=".3g"),
        alt.Tooltip("asked:Q", format=","),
    ]
    mo.vstack(
        [
            mo.md(
                "## People\n\nCalls that a person had to decide about, what they decided and how long it took. "
                + (f"In all: {_said}." if _said else "Nobody was asked.")
                + (
                    f" {_nobody:,} questions were answered by nobody who is named: nobody was there or answered in time, or "
                    "code decided."
                    if _nobody
                    else ""
                )
            ),
            beside(
                stacked(_over_time, bucket=page.bucket, kinds=_present, color="verdict", y="asked", title="Decisions"),
                lines(_waits, y="minutes", title="Median time to a decision, minutes", color="verdict",
                      colors={k: v for k, v in _present.items() if k not in ("nobody", "none")}, tooltip=_tips),
            )
            if _over_time.height
            else None,
        ]
    )  # fmt: skip
    return


@app.cell(hide_code=True)
def _(page):
    _kinds = {"policy": RED, "limit": ORANGE, "stop": PURPLE, "other": GREY}
    _rules = page.refusals.group_by("at", "rule").agg(pl.col("runs").sum()).sort("at", "rule")
    _present = {k: v for k, v in _kinds.items() if k in _rules["rule"].unique().to_list()}
    _total = page.refusals.group_by("rule", "error").agg(pl.col("runs").sum()).sort("runs", descending=True)
    _said = ", ".join(f"{row['error']} {row['runs']:,}" for row in _total.iter_rows(named=True))
    _used = (
        page.budget.group_by("used")
        .agg(pl.col("runs").sum())
        .sort("used")
        .with_columns((pl.col("used") + 0.047).alias("to"))
    )
    _full = int(_used.filter(pl.col("used") >= 0.8)["runs"].sum())
    _histogram = (
        alt.Chart(values(_used.with_columns((pl.col("used") >= 0.8).alias("tight"))))
        .mark_bar()
        .encode(
            x=alt.X("used:Q", title=None, axis=alt.Axis(format=".0%", grid=False), scale=alt.Scale(domain=[0, 1.05])),
            x2="to:Q",
            y=alt.Y("runs:Q", title=None, axis=alt.Axis(format="~s", tickCount=5)),
            y2=alt.datum(0),
            color=alt.condition("datum.tight", alt.value(ORANGE), alt.value(BLUE)),
            tooltip=[alt.Tooltip("used:Q", title="from", format=".0%"), alt.Tooltip("runs:Q", format=",")],
        )
    )
    mo.vstack(
        [
            mo.md(
                "## Rules and limits\n\nRuns that a rule ended: a **policy** (a call that was not permitted), a **limit** (the "
                "budget) or a **stop** (somebody pressed it). " + (f"In all: {_said}. " if _said else "There was none. ")
                + f"Runs that used 80 % or more of their tightest limit: {_full:,}; `agentkit budget suggest SYSTEM` says what fits."
            ),
            beside(
                stacked(_rules, bucket=page.bucket, kinds=_present, color="rule", y="runs", title="Runs that a rule ended")
                if _rules.height
                else mo.md("*No run was ended by a rule.*"),
                finished(_histogram, "Share of the tightest limit that runs used"),
            ),
        ]
    )  # fmt: skip
    return


@app.cell(hide_code=True)
def _(page):
    _percent = alt.Axis(format=".0%", tickCount=5)
    _colors = {"completion": GREEN, "acceptance": BLUE}
    _rows = page.rates.filter(pl.col("figure").is_in(list(_colors)))
    _tips = [alt.Tooltip("figure:N"), alt.Tooltip("value:Q", format=".1%"), alt.Tooltip("n:Q", format=",")]
    _given = [alt.Tooltip("value:Q", title="mean", format=".2f"), alt.Tooltip("n:Q", title="ratings", format=",")]
    mo.vstack(
        [
            mo.md(
                "## Did it help\n\n**Completion** stands in where no label exists: the run succeeded without escalation, and nobody "
                "corrected, rejected, reopened or escalated it. Silence counts as consent, so the truth is at most this. "
                "**Acceptance** is of the runs that somebody did label. Who says more of a run than once is counted with the last "
                "label and the last rating; what is said of a run that another called counts for that one. Say something of "
                "a run with `agentkit feedback RUN --label accepted --rating 5`."
            ),
            beside(
                lines(_rows, y="value", title="Goal completion and acceptance", color="figure", colors=_colors, axis=_percent,
                      zero=False, tooltip=_tips),
                lines(page.ratings, y="value", title="User satisfaction, 1 to 5", zero=False, tooltip=_given)
                if page.ratings.height
                else mo.md("*Nobody has rated a run.*"),
            ),
        ]
    )  # fmt: skip
    return


@app.cell(hide_code=True)
def _(page):
    # The golden set of the system that is looked at, or of the one with most runs, where one fits.
    _golden, _why = [], "no system"
    if page.sampled_system:
        try:
            _golden = read_examples(find_golden(page.sampled_system))
        except AgentkitError as e:
            _why = str(e)
    _drift = operations.drift_of(page, _golden, events.payloads())
    _of = {"golden": "golden ones", "before": "of the time before", None: ""}[_drift.against]
    _parts = [
        mo.md(
            f"## Drift of {prose(str(page.sampled_system), 60)}\n\nDoes what comes in, and where it is sent, still look like the "
            + ("time before this one, as long? " if _drift.against == "before" else "golden set? ")
            + "Each distance stands beside what chance alone reaches in 95 of 100 cases; a filled point lies beyond "
            "chance even after correction for the number of looks."
            + (
                " A golden set covers rare cases and need not be like the traffic: watch the change more than the level."
                if _drift.against == "golden"
                else ""
            )
        )
    ]
    if _drift.against != "golden":
        _parts.append(
            mo.md(
                f"*No golden set to compare with: {prose(_drift.why_not_golden or _why, 300)}.*"
                + (" *So each is compared with the time before.*" if _drift.against else "")
                + ("" if page.chosen.since else " *Choose a time above to compare with the time before it.*")
            )
        )
    if _drift.routes is not None:
        _rows = values(_drift.routes)
        _x = over_time()
        _tips = [alt.Tooltip("at:T", format="%a %d %b %H:%M", formatType="utc"), alt.Tooltip("distance:Q", format=".3f"), alt.Tooltip("by_chance:Q", format=".3f"),
                 alt.Tooltip("p:Q", format=".4f"), alt.Tooltip("runs:Q", format=",")]  # fmt: skip
        _chance = (
            alt.Chart(_rows)
            .mark_area(color=GREY, opacity=0.25, interpolate="step")
            .encode(x=_x, y=alt.Y("by_chance:Q", title=None))
        )
        _line = alt.Chart(_rows).mark_line(color=BLUE, strokeWidth=2).encode(x=_x, y="distance:Q")
        _points = alt.Chart(_rows).mark_point(size=45, strokeWidth=2).encode(
            x=_x, y="distance:Q", tooltip=_tips, color=alt.condition("datum.is_drift", alt.value(RED), alt.value(BLUE)),
            fill=alt.condition("datum.is_drift", alt.value(RED), alt.value("white")),
        )  # fmt: skip
        _title = "Routes: Jensen–Shannon distance" + (" from the time before" if _drift.against == "before" else "")
        _routes = finished(_chance + _line + _points, f"{_title} (grey: by chance)")
    elif _drift.against == "golden":
        _routes = mo.md("*The golden set expects no routes.*")
    else:
        _routes = mo.md("*No route was taken in one of the two times.*")
    if _drift.inputs is not None:
        _y = alt.Y("feature:N", sort=None, title=None, axis=alt.Axis(grid=False, labelLimit=230, labelPadding=8))
        _limits, _ticks = alt.Scale(domain=[0.4, 1]), alt.Axis(values=[0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1], format=".1f")
        _tips = [alt.Tooltip("feature:N"), alt.Tooltip("auc:Q", format=".3f"), alt.Tooltip("by_chance:Q", format=".3f"),
                 alt.Tooltip("p:Q", format=".3f"), alt.Tooltip("live:Q"), alt.Tooltip("golden:Q", title=_drift.against)]  # fmt: skip
        _base = alt.Chart(values(_drift.inputs)).encode(y=_y)
        _chance = _base.mark_bar(color=GREY, opacity=0.3, height=14).encode(
            x=alt.X("by_chance:Q", title=None, scale=_limits, axis=_ticks), x2=alt.datum(0.5)
        )
        _points = _base.mark_point(size=80, strokeWidth=2).encode(
            x=alt.X("auc:Q", title=None, scale=_limits, axis=_ticks), tooltip=_tips,
            color=alt.condition("datum.is_drift", alt.value(RED), alt.value(BLUE)),
            fill=alt.condition("datum.is_drift", alt.value(RED), alt.value("white")),
        )  # fmt: skip
        _inputs = finished(
            _chance + _points,
            f"Inputs: how well {_drift.live} logged ones are told from {_drift.others} {_of} (AUC)",
        )
    else:
        _inputs = mo.md("*No logged input was kept to compare.*")
    if _drift.against:
        _parts.append(beside(_routes, _inputs))
    if _drift.blank:
        _names = ", ".join(prose(name, 60) for name in _drift.blank)
        _parts.append(mo.md(f"*Not compared: the wording of {_names}, since all of these texts are blank.*"))
    mo.vstack(_parts)
    return


@app.cell(hide_code=True)
def _(chosen, page):
    page
    try:
        _settings = load_settings()
        with RunLog().connection() as _opened:
            every = costs.tasks(_opened, chosen, settings=_settings)
    except AgentkitError as e:
        every = None
        _said = mo.callout(mo.md(f"**No cost model:** {prose(str(e), 300)}"), kind="danger")
    mo.stop(every is None, None if every is not None else _said)
    tasks, of_stage = costs.projected(every, chosen.stage)
    mo.stop(not tasks.frame.height, mo.md("## What it will cost\n\n*Only evaluations here: nothing to project.*"))
    volume = mo.ui.number(1, 1e9, value=min(1e9, max(1, round(tasks.a_month))), label="Tasks a month", debounce=True)
    hosting = mo.ui.number(
        value=None, label="Hosting, USD", debounce=True
    )  # without a least value it may be left empty
    monitoring = mo.ui.number(value=None, label="Monitoring, USD", debounce=True)
    models = tasks.use["model"].unique().sort().to_list()
    rates = mo.ui.dictionary(
        {
            f"{side} of {model}": mo.ui.number(
                value=None, step=0.01, label=f"{model}: {side}, USD per million tokens", debounce=True
            )
            for model in models
            for side in ("input", "output")
        }
    )
    return every, hosting, models, monitoring, of_stage, rates, tasks, volume


@app.cell(hide_code=True)
def _(every, hosting, monitoring, of_stage, tasks, volume):
    _others = round((costs.work(every).frame.height - tasks.frame.height) * tasks.scale)
    mo.vstack(
        [
            mo.md(
                f"## What it will cost\n\nFrom {tasks.frame.height:,} logged tasks"
                + (f" (drawn from {tasks.frame.height * tasks.scale:,.0f})" if tasks.scale > 1.001 else "")
                + f" of the stage {of_stage} in {tasks.days:.3g} days, which is the time chosen above as far as the log goes back"
                + (f"; {_others:,} of another stage are not counted: choose it above" if _others else "")
                + ". The tasks a month are at that rate until you say otherwise. Intervals know how uncertain the mean is and "
                "how much tasks differ, not what nobody has logged yet: other customers, other prompts."
            ),
            mo.hstack([volume, hosting, monitoring], justify="start", gap=1.5, wrap=True),
        ]
    )
    return


@app.function
def bill(now, then=None):
    """A month, line by line, as a table; beside it what it would be at other prices."""

    def amount(row):
        if row["usd"] is None:
            return "unknown" if row["line"] == "total" else "not given"
        exact = row["line"] in ("hosting", "monitoring") or row["low"] is None
        return usd(row["usd"]) + ("" if exact else f" ({usd(row['low'])} to {usd(row['high'])})")

    titles = [
        "",
        "tasks",
        "tokens in",
        "tokens out",
        "USD (95 %)",
        *(["what if, USD (95 %)"] if then is not None else []),
    ]
    lines = ["| " + " | ".join(titles) + " |", "|:---" + "|---:" * (len(titles) - 1) + "|"]
    for row, other in zip(now.to_dicts(), (now if then is None else then).to_dicts(), strict=True):
        name = row["line"] if row["system"] is None else f"{row['system']}, {row['tier']}"
        tokens = ["" if row[c] is None else f"{row[c] / 1e6:,.1f} M" for c in ("tokens_in", "tokens_out")]
        cells = [prose(name, 80), "" if row["tasks"] is None else f"{row['tasks']:,.0f}", *tokens, amount(row)]
        cells += [] if then is None else [amount(other)]
        lines.append("| " + " | ".join(f"**{c}**" if c and row["line"] == "total" else c for c in cells) + " |")
    return mo.md("\n".join(lines).replace("$", "\\$"))


@app.cell(hide_code=True)
def _(hosting, models, monitoring, rates, tasks, volume):
    def _number(given):
        return given if given is not None and given >= 0 else None

    _pairs = {m: (_number(rates.value[f"input of {m}"]), _number(rates.value[f"output of {m}"])) for m in models}
    _prices = {m: Price(input=p[0], output=p[1]) for m, p in _pairs.items() if None not in p}
    _options = {"hosting": _number(hosting.value), "monitoring": _number(monitoring.value)}
    _now = costs.month(tasks, volume.value or 1, **_options)
    _then = costs.month(costs.repriced(tasks, _prices), volume.value or 1, **_options) if _prices else None
    mo.vstack(
        [
            bill(_now, _then),
            mo.accordion(
                {
                    "What if prices were others": mo.vstack(
                        [
                            mo.md("A price counts once both its numbers are given. Other models keep what was logged."),
                            rates.vstack(),
                        ]
                    )
                }
            ),
        ]
    )
    return


@app.cell(hide_code=True)
def _(every, tasks):
    _each = costs.distribution(tasks).filter(pl.col("amount") == "usd").drop_nulls("mean")
    _own = _each.select(
        pl.format("{}, {}", "system", "tier").alias("agent"), "mean", "p99", pl.lit("measured").alias("source")
    )
    _published = costs.published().select(
        pl.format("{} agents", "kind").alias("agent"), "mean", "p99", pl.lit("published").alias("source")
    )
    _both = pl.concat([_own, _published])
    _y = alt.Y("agent:N", sort=None, title=None, axis=alt.Axis(grid=False, labelLimit=260, labelPadding=8))
    _x = alt.Scale(type="log")
    _axis = alt.Axis(format="$~g", values=[10.0**n for n in range(-7, 4)])
    _color = alt.Color("source:N", scale=alt.Scale(domain=["measured", "published"], range=[BLUE, GREY]))
    _tips = [alt.Tooltip("agent:N"), alt.Tooltip("mean:Q", format="$.4g"), alt.Tooltip("p99:Q", format="$.4g")]
    _base = alt.Chart(values(_both.filter(pl.col("mean") > 0))).encode(y=_y, color=_color)
    _chart = _base.mark_rule(strokeWidth=4, opacity=0.45).encode(
        x=alt.X("mean:Q", title=None, scale=_x, axis=_axis), x2="p99:Q"
    ) + _base.mark_point(filled=True, size=70, opacity=1).encode(x=alt.X("mean:Q", scale=_x), tooltip=_tips)
    _chart += _base.mark_tick(thickness=3, size=14).encode(x=alt.X("p99:Q", scale=_x), tooltip=_tips)

    def _line(row):
        side = f"- **{prose(row['system'], 60)}**: {row['pilot_tasks']:,} pilot tasks, {row['production_tasks']:,} in production; "
        if row["of_a_task"] is None:
            return side + "one side has no task with a known cost, so there is nothing to compare."
        between = "" if row["low"] is None else f" ({row['low']:.2g} to {row['high']:.2g})"
        return side + (
            f"a task costs {row['of_a_task']:.2g}×{between} what it cost in the pilot, "
            f"all tasks of this time **{row['in_all']:.2g}×**."
        )

    _pilot = costs.pilot_to_production(every)
    _low, _high = costs.PILOT_TO_PRODUCTION
    mo.vstack(
        [
            beside(
                finished(_chart, "USD of a task: mean (point) to p99 (tick)", height=30 * _both.height),
                mo.md(
                    f"**From the pilot to production.** The literature says {_low:g} to {_high:g} times the pilot's cost. Measured "
                    "here, drafts and evaluations against production:\n\n"
                    + "\n".join(_line(row) for row in _pilot.iter_rows(named=True))
                ),
            )
        ]
    )
    return


if __name__ == "__main__":
    app.run()
