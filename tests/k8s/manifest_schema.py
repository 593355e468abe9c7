"""A strict schema of the fields that our manifests use, so that a misspelt field fails without a cluster.

It is narrower than Kubernetes and KubeRay 1.7 (ray.io/v1): a field that we do not use is refused, so that whoever adds
one looks up what the operator makes of it. That alone rules out host mounts, host networks, submitter pods, restart
policies and secrets in the open.
"""

from __future__ import annotations

from typing import Any

import jsonschema

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string", "minLength": 1}
_YES: Schema = {"const": True}
_NO: Schema = {"const": False}
_STRINGS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
# Kubernetes' syntax of a name that starts with a letter, and of a label's key and value.
_NAME: Schema = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
_LABELS: Schema = {
    "type": "object",
    "propertyNames": {"pattern": "^([a-z0-9.-]+/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"},
    "additionalProperties": {"type": "string", "pattern": "^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"},
}


def _whole(minimum: int) -> Schema:
    return {"type": "integer", "minimum": minimum}


def _object(required: str, optional: str = "", /, **properties: Schema) -> Schema:
    """Return the schema of an object with these properties and no others; every one is named in one of the lists."""
    assert set(properties) == {*required.split(), *optional.split()}
    return {"type": "object", "required": required.split(), "properties": properties, "additionalProperties": False}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


def _document(api_version: str, kind: str, **properties: Schema) -> Schema:
    metadata = _object("name", "namespace labels", name=_NAME, namespace=_NAME, labels=_LABELS)
    fixed = {"apiVersion": {"const": api_version}, "kind": {"const": kind}, "metadata": metadata}
    return _object(" ".join([*fixed, *properties]), **fixed, **properties)


_QUANTITY: Schema = {"type": "string", "pattern": "^[0-9]+(m|Mi|Gi|Ti)?$"}
_QUANTITIES: Schema = {"type": "object", "required": ["cpu", "memory"], "additionalProperties": _QUANTITY}

_ENV: Schema = {
    "oneOf": [
        # A name that sounds like a secret takes its value from one.
        _object(
            "name value", name={"not": {"pattern": "KEY|TOKEN|SECRET|PASSWORD"}, **_TEXT}, value={"type": "string"}
        ),
        _object(
            "name valueFrom",
            name=_TEXT,
            valueFrom=_object(
                "secretKeyRef",
                secretKeyRef=_object("name key", "optional", name=_NAME, key=_TEXT, optional={"type": "boolean"}),
            ),
        ),
    ]
}
_ENV_FROM: Schema = {
    "oneOf": [
        _object("configMapRef", configMapRef=_object("name", name=_NAME)),
        _object("secretRef", secretRef=_object("name", name=_NAME)),
    ]
}
_CONTAINER = _object(
    "name image imagePullPolicy envFrom resources securityContext",
    "env volumeMounts",
    name=_NAME,
    image={"type": "string", "pattern": "^[^:@]+(:[0-9]+/[^:@]+)?:[0-9]+\\.[0-9]+\\.[0-9]+$"},
    imagePullPolicy={"const": "IfNotPresent"},
    envFrom=_list(_ENV_FROM),
    env=_list(_ENV),
    resources=_object("requests limits", requests=_QUANTITIES, limits=_QUANTITIES),
    securityContext=_object(
        "allowPrivilegeEscalation capabilities",
        allowPrivilegeEscalation=_NO,
        capabilities=_object("drop", drop={"const": ["ALL"]}),
    ),
    volumeMounts=_list(
        _object("name mountPath", "readOnly", name=_NAME, mountPath={"pattern": "^/", **_TEXT}, readOnly=_YES)
    ),
)
_VOLUME: Schema = {
    "oneOf": [
        _object("name configMap", name=_NAME, configMap=_object("name", name=_NAME)),
        _object("name persistentVolumeClaim", name=_NAME, persistentVolumeClaim=_object("claimName", claimName=_NAME)),
    ]
}
_POD_TEMPLATE = _object(
    "metadata spec",
    metadata=_object("labels", labels=_LABELS),
    spec=_object(
        "automountServiceAccountToken terminationGracePeriodSeconds securityContext containers",
        "volumes tolerations nodeSelector",
        automountServiceAccountToken=_NO,
        terminationGracePeriodSeconds=_whole(30),
        securityContext=_object(
            "runAsNonRoot runAsUser runAsGroup fsGroup seccompProfile",
            runAsNonRoot=_YES,
            runAsUser=_whole(1),
            runAsGroup=_whole(1),
            fsGroup=_whole(1),
            seccompProfile=_object("type", type={"const": "RuntimeDefault"}),
        ),
        containers={**_list(_CONTAINER), "maxItems": 1},
        volumes=_list(_VOLUME),
        tolerations=_list(
            _object("key operator effect", key=_TEXT, operator={"const": "Exists"}, effect={"const": "NoSchedule"})
        ),
        nodeSelector=_LABELS,
    ),
)
# The operator refuses labels here: a group's own field is their place.
_START_PARAMS: Schema = {**_STRINGS, "propertyNames": {"not": {"const": "labels"}}}
_RAY_CLUSTER = _object(
    "rayVersion authOptions headGroupSpec workerGroupSpecs",
    # Token mode needs the version beside it; 2.52 is the first that has it.
    rayVersion={"type": "string", "pattern": "^2\\.(5[2-9]|[6-9][0-9])\\.[0-9]+$"},
    authOptions=_object("mode", mode={"const": "token"}),
    headGroupSpec=_object("rayStartParams template", rayStartParams=_START_PARAMS, template=_POD_TEMPLATE),
    workerGroupSpecs=_list(
        _object(
            "groupName labels replicas minReplicas maxReplicas rayStartParams template",
            groupName=_NAME,
            labels={**_LABELS, "required": ["region"]},
            replicas=_whole(1),
            minReplicas=_whole(0),
            maxReplicas=_whole(1),
            rayStartParams=_START_PARAMS,
            template=_POD_TEMPLATE,
        )
    ),
)
_RAY_JOB = _document(
    "ray.io/v1",
    "RayJob",
    spec=_object(
        "entrypoint submissionMode backoffLimit preRunningDeadlineSeconds activeDeadlineSeconds "
        "shutdownAfterJobFinishes ttlSecondsAfterFinished rayClusterSpec",
        entrypoint=_TEXT,
        # SidecarMode submits before there are workers; K8sJobMode from a pod that our network policy keeps out.
        submissionMode={"const": "HTTPMode"},
        backoffLimit=_whole(0),
        preRunningDeadlineSeconds=_whole(1),
        activeDeadlineSeconds=_whole(1),
        # A time to live is refused without it.
        shutdownAfterJobFinishes=_YES,
        ttlSecondsAfterFinished=_whole(0),
        rayClusterSpec=_RAY_CLUSTER,
    ),
)

_SELECTOR = _object("", "matchLabels", matchLabels=_LABELS)
_PEERS = _list(_object("podSelector", "namespaceSelector", podSelector=_SELECTOR, namespaceSelector=_SELECTOR))
_PORTS = _list(_object("port protocol", port={**_whole(1), "maximum": 65535}, protocol={"enum": ["TCP", "UDP"]}))
_NETWORK_POLICY = _document(
    "networking.k8s.io/v1",
    "NetworkPolicy",
    spec=_object(
        "podSelector policyTypes ingress egress",
        podSelector=_SELECTOR,
        # Both: what is not named below is denied.
        policyTypes={"const": ["Ingress", "Egress"]},
        # A rule without peers would let everybody in.
        ingress=_list(_object("from", "ports", **{"from": _PEERS, "ports": _PORTS})),
        egress={
            "type": "array",
            "items": {**_object("", "to ports", to=_PEERS, ports=_PORTS), "minProperties": 1},
        },
    ),
)
_VOLUME_CLAIM = _document(
    "v1",
    "PersistentVolumeClaim",
    spec=_object(
        "accessModes resources",
        accessModes={"const": ["ReadWriteOnce"]},
        resources=_object("requests", requests=_object("storage", storage=_QUANTITY)),
    ),
)
_SCHEMAS: dict[str, Schema] = {
    "RayJob": _RAY_JOB,
    "ConfigMap": _document("v1", "ConfigMap", data=_STRINGS),
    "PersistentVolumeClaim": _VOLUME_CLAIM,
    "NetworkPolicy": _NETWORK_POLICY,
}


def schema_errors(document: dict[str, Any]) -> list[str]:
    """Return what is wrong with a manifest, each with where; a kind that we do not use is wrong as a whole."""
    schema = _SCHEMAS.get(document.get("kind", ""))
    if schema is None:
        return [f"kind {document.get('kind')!r} is none of {', '.join(_SCHEMAS)}"]
    errors = jsonschema.Draft202012Validator(schema).iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in errors]
