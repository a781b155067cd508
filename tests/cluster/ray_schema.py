"""A schema of those fields of KubeRay's RayCluster and RayJob (ray.io/v1) that cluster/ uses, which rejects all others.

Pod templates are checked as pods, by Kubernetes' own schema.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def fields(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
TREE: Schema = {"type": "object"}
SECRET = fields(
    ("valueFrom",), valueFrom=fields(("secretKeyRef",), secretKeyRef=fields(("name", "key"), name=TEXT, key=TEXT))
)
HEAD = fields(("template",), rayStartParams=TEXTS, template=TREE, labels=TEXTS)
WORKERS = fields(
    ("groupName", "template", "minReplicas", "maxReplicas"),
    groupName={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"},
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    labels=TEXTS,
    rayStartParams=TEXTS,
    template=TREE,
)
CLUSTER = fields(
    ("rayVersion", "headGroupSpec", "authOptions"),
    rayVersion=TEXT,
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=fields(version={"enum": ["v1", "v2"]}, idleTimeoutSeconds=COUNT, resources=TREE),
    authOptions=fields(("mode",), mode={"const": "token"}),
    gcsFaultToleranceOptions=fields(("redisAddress", "redisPassword"), redisAddress=TEXT, redisPassword=SECRET),
    headGroupSpec=HEAD,
    workerGroupSpecs={"type": "array", "items": WORKERS, "minItems": 1},
)
JOB = fields(
    ("entrypoint", "rayClusterSpec"),
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    shutdownAfterJobFinishes={"const": True},
    ttlSecondsAfterFinished=COUNT,
    backoffLimit=COUNT,
    submitterConfig=fields(backoffLimit=COUNT),
    preRunningDeadlineSeconds={"type": "integer", "minimum": 1},
    rayClusterSpec=CLUSTER,
)
SPECS = {"RayCluster": CLUSTER, "RayJob": JOB}


def schema_of(kind: str) -> Schema:
    metadata = fields(
        ("name", "namespace"),
        name={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47},
        namespace=TEXT,
        annotations=TEXTS,
    )
    return fields(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=metadata,
        spec=SPECS[kind],
    )
