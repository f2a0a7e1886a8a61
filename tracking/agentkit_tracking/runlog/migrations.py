"""The schema of the run log's database, as numbered steps. A step that was released is never changed."""

from __future__ import annotations

# Half of the size and of the time of what DuckDB would choose for these texts; a lake knows no such words.
ZSTD = " USING COMPRESSION zstd"
_EVENT_COLUMNS = f"""
    segment VARCHAR, n BIGINT, logged_at TIMESTAMPTZ, type VARCHAR, run_id VARCHAR, parent VARCHAR, system VARCHAR,
    release VARCHAR, stage VARCHAR, kind VARCHAR, agent VARCHAR, state VARCHAR, step BIGINT, name VARCHAR, model VARCHAR,
    result VARCHAR, error_type VARCHAR, started_at TIMESTAMPTZ, started DOUBLE, seconds DOUBLE, tokens_in BIGINT,
    tokens_out BIGINT, usd DOUBLE, cached BOOLEAN, tries BIGINT, route VARCHAR, waited_s DOUBLE, model_calls BIGINT,
    tool_calls BIGINT, planning_s DOUBLE, execution_s DOUBLE, reflection_s DOUBLE, effects BIGINT, failed_calls BIGINT,
    approvals BIGINT, refusals BIGINT, is_degraded BOOLEAN, budget_used DOUBLE, rating DOUBLE, user_hash VARCHAR,
    session VARCHAR, event VARCHAR{ZSTD}, private VARCHAR{ZSTD}, salt VARCHAR, hash VARCHAR
"""
MIGRATIONS: dict[int, tuple[str, ...]] = {
    1: (
        "CREATE TABLE log.migrations (version BIGINT, migrated_at TIMESTAMPTZ)",
        f"CREATE TABLE log.events ({_EVENT_COLUMNS})",
        # How far each segment is folded: the next byte, and the last event with its hash.
        "CREATE TABLE log.positions (segment VARCHAR, state VARCHAR, host VARCHAR, pid BIGINT, next_byte BIGINT, n BIGINT, "
        "hash VARCHAR, torn_bytes BIGINT, folded_at TIMESTAMPTZ)",
        # Several rows a segment in a lake, where nothing is changed in place; the furthest counts.
        "CREATE VIEW log.segments AS SELECT * FROM log.positions "
        "QUALIFY row_number() OVER (PARTITION BY segment ORDER BY next_byte DESC, state <> 'open' DESC) = 1",
        "CREATE TABLE log.heads (segment VARCHAR, n BIGINT, hash VARCHAR, signed_at VARCHAR, key_id VARCHAR, signature VARCHAR)",
        "CREATE TABLE log.findings (segment VARCHAR, byte BIGINT, n BIGINT, fault VARCHAR, why VARCHAR, found_at TIMESTAMPTZ)",
    ),
    2: (
        # Days that were moved out of `events`; a file counts from the moment it stands here.
        "CREATE TABLE log.archives (day DATE, file VARCHAR, events BIGINT, sha256 VARCHAR, archived_at TIMESTAMPTZ)",
        # Stretches of a chain that are gone for good, signed: what comes next continues from `hash`.
        "CREATE TABLE log.pruned (segment VARCHAR, first_n BIGINT, last_n BIGINT, hash VARCHAR, signed_at VARCHAR, "
        "key_id VARCHAR, signature VARCHAR)",
    ),
    3: (
        # Heads are a chain of their own: none can be left out.
        "ALTER TABLE log.heads ADD COLUMN number BIGINT",
        "ALTER TABLE log.heads ADD COLUMN previous VARCHAR",
    ),
    4: (
        # Archive files that were replaced or pruned, or do not count yet: only these are ever removed.
        "CREATE TABLE log.expendable (file VARCHAR)",
    ),
}
NEWEST = max(MIGRATIONS)
