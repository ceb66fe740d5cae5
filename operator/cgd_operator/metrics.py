"""The operator's figures for Prometheus. Labels are bounded: never a name of a run or a namespace."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REGISTRY = CollectorRegistry()

RUNS = Gauge("cgd_runs", "CGDRuns by state, as of the last sweep.", ["state"], registry=REGISTRY)
STAGE_SECONDS = Histogram(
    "cgd_stage_seconds",
    "Seconds from a stage's start to its end.",
    ["stage", "state"],
    buckets=(10, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600, 72 * 3600),
    registry=REGISTRY,
)
RECONCILE_SECONDS = Histogram("cgd_reconcile_seconds", "Seconds that one look at a run takes.", registry=REGISTRY)
RECONCILE_ERRORS = Counter(
    "cgd_reconcile_errors", "Reconciles that failed: api (tried again), bug (ours).", ["kind"], registry=REGISTRY
)
API_REQUESTS = Counter(
    "cgd_api_requests",
    "Requests to the API server, without those of Kopf's watches.",
    ["method", "code"],
    registry=REGISTRY,
)
QUEUE = Gauge("cgd_queue_depth", "Runs that wait for a look, or have one.", registry=REGISTRY)
LAST_SWEEP = Gauge("cgd_last_sweep_timestamp_seconds", "When all runs were last looked over.", registry=REGISTRY)
LAST_EVENT = Gauge("cgd_last_event_timestamp_seconds", "When a watch last reported a change.", registry=REGISTRY)
LEADER = Gauge("cgd_leader", "1 while this operator acts.", registry=REGISTRY)
