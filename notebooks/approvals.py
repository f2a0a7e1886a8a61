import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="Approvals")

with app.setup:
    import json

    import marimo as mo

    from agentkit.errors import AgentkitError
    from agentkit_tracking.control import ControlPlane
    from agentkit_tracking.control.approvals import POLL_S, decided
    from agentkit_tracking.control.card import card, clip, prose, visible
    from agentkit_tracking.home import author

    desk = ControlPlane().desk


@app.cell(hide_code=True)
def _():
    refresh = mo.ui.refresh(options=["2s", "10s", "1m"], default_interval="2s")
    mo.vstack(
        [
            mo.hstack([mo.md("# Approvals"), refresh], align="center"),
            mo.md(
                f"Calls of agents that wait for a person. You decide as **{prose(author(), 60)}**, signed with this "
                "machine's key: keep the page on loopback, for yourself."
            ),
        ]
    )
    return (refresh,)


@app.cell(hide_code=True)
def _():
    # Of this page: what waits, which one is open (at first the most urgent), what was last recorded or refused.
    get_waiting, set_waiting = mo.state([a.id for a in desk.waiting()])
    get_open, set_open = mo.state(next(iter(get_waiting()), None))
    get_said, set_said = mo.state(None)
    return get_open, get_said, get_waiting, set_open, set_said, set_waiting


@app.cell(hide_code=True)
def _(get_said, get_waiting, refresh, set_waiting):
    (refresh.value, get_said())
    _now = [a.id for a in desk.waiting()]
    if _now != get_waiting():  # else the list is not drawn anew under somebody's pointer
        set_waiting(_now)
    return


@app.cell(hide_code=True)
def _(get_open, get_waiting, set_open, set_said):
    _waiting = [desk.get(i) for i in get_waiting()]
    _labels = {
        clip(visible(f"{a.request.agent}: {a.request.tool} · {a.request.reason}"), 100) + f" · {a.id}": a.id
        for a in _waiting
    }
    picker = mo.ui.radio(
        options=_labels,
        value=next((label for label, i in _labels.items() if i == get_open()), None),
        label=f"{len(_labels)} waiting; the one that expires first is at the top",
        on_change=lambda chosen: (set_open(chosen), set_said(None)),
    )
    picker if _labels else mo.callout(mo.md("Nothing waits for a decision."), kind="neutral")
    return


@app.cell(hide_code=True)
def _(get_said):
    get_said()
    return


@app.cell(hide_code=True)
def _(get_open):
    # Drawn anew only when another one is opened: what is being typed stays.
    opened = desk.get(get_open()) if get_open() else None
    _asked = {} if opened is None else opened.request.arguments
    _rows = min(12, max(4, len(_asked) + 2))
    arguments = mo.ui.text_area(
        value=json.dumps(_asked, indent=2, ensure_ascii=False),
        rows=_rows,
        full_width=True,
        label="Arguments, as JSON; change values to approve other ones",
    )
    reason = mo.ui.text_area(
        placeholder="needed to change or to reject; recorded with your name",
        rows=_rows - 2,
        full_width=True,
        label="Your reason",
    )
    approve = mo.ui.run_button(label="Approve", kind="success")
    modify = mo.ui.run_button(label="Approve as changed", kind="warn")
    reject = mo.ui.run_button(label="Reject", kind="danger")
    mo.vstack(
        [
            mo.callout(mo.md(card(opened)), kind="info"),
            mo.hstack(
                [arguments, mo.vstack([reason, mo.hstack([approve, modify, reject], justify="start", gap=0.5)])],
                widths="equal",
                gap=1,
            ),
        ]
    ) if opened is not None else None
    return approve, arguments, modify, opened, reason, reject


@app.function
def decide(shown, verdict, why, text):
    """What a press of a button records, as a callout; and whether it was recorded."""
    try:
        try:
            given = json.loads(text)
        except ValueError as e:
            raise AgentkitError(f"the arguments are no JSON: {e}") from None
        if verdict != "modify" and json.dumps(given, sort_keys=True) != json.dumps(
            shown.request.arguments, sort_keys=True
        ):
            raise AgentkitError(
                "you changed the arguments: press “Approve as changed”, or put back what was asked about"
            )
        desk.decide(shown.id, verdict, why, given if verdict == "modify" else None, shown=shown)
    except AgentkitError as e:
        return mo.callout(mo.md(f"**Nothing was recorded:** {prose(str(e), 300)}"), kind="danger"), False
    said = prose(decided(desk.get(shown.id)), 300)
    return (
        mo.callout(
            mo.md(f"**Recorded and signed:** {shown.id} {said}. The run goes on within {POLL_S:g} s."), kind="success"
        ),
        True,
    )


@app.cell(hide_code=True)
def _(approve, arguments, modify, opened, reason, reject, set_open, set_said):
    _verdict = "approve" if approve.value else "modify" if modify.value else "reject" if reject.value else None
    if opened is not None and _verdict:
        _said, _done = decide(opened, _verdict, reason.value, arguments.value)
        set_said(_said)
        if _done:
            set_open(None)  # the next one is opened by hand: a second click must not decide what nobody has read
    return


@app.cell(hide_code=True)
def _(get_said, get_waiting):
    (get_waiting(), get_said())
    _rows = [
        {
            "id": a.id,
            "agent": a.request.agent,
            "tool": a.request.tool,
            "outcome": decided(a),
        }
        for a in desk.all(50)
        if a.decision is not None
    ]
    mo.accordion({f"Decided ({len(_rows)})": mo.ui.table(_rows, selection=None)}) if _rows else None
    return


if __name__ == "__main__":
    app.run()
