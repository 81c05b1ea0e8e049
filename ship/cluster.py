"""The Kubernetes manifest and the Prometheus scrape configuration of a parcel, as JSON values that YAML can spell.

The manifest runs llama.cpp's own server image on a volume that holds the parcel. An init container checks every file against
SHA256SUMS before the model is loaded; memory is limited to what the file, the cache and the buffers take.
"""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from r1q.ship.facts import ModelFacts

PORT = 8080
_SPARE = 768 << 20  # llama.cpp's compute buffers and the process itself
_MIB = 1 << 20
_CHECK_IMAGE = "busybox:1.37"
_MOUNT = {"name": "parcel", "mountPath": "/parcel", "readOnly": True}
_LOCKED = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
_IMAGES = {False: "ghcr.io/ggml-org/llama.cpp:server", True: "ghcr.io/ggml-org/llama.cpp:server-cuda"}


def object_name(name: str) -> str:
    """Return `name` as Kubernetes allows names: small letters, digits and hyphens, at most 52 of them."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:52].strip("-") or "model"


def kubernetes_yaml(
    facts: ModelFacts, file: str, *, name: str, bytes: int, context: int, parallel: int, gpu: bool
) -> str:
    """Return a Deployment and a Service for `file` of `bytes`; the claim `<name>-parcel` must hold the parcel's files."""
    objects = [
        _deployment(facts, file, name=name, size=bytes, context=context, parallel=parallel, gpu=gpu),
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "labels": {"app": name}},
            "spec": {
                "selector": {"app": name},
                "ports": [{"name": "http", "port": PORT, "targetPort": "http"}],
            },
        },
    ]
    head = (
        f"# Copy this parcel's files into the volume of the claim {name}-parcel, then: kubectl apply -f kubernetes.yaml\n"
        f"# A key: kubectl create secret generic {name}-key --from-literal=key=…\n"
        "# Pin the images by digest before production.\n"
    )
    # Parts that occur twice are written twice: through JSON nothing is shared, and YAML makes no aliases.
    plain = json.loads(json.dumps(objects))
    return head + str(yaml.safe_dump_all(plain, sort_keys=False, allow_unicode=True, width=120))


def _deployment(
    facts: ModelFacts, file: str, *, name: str, size: int, context: int, parallel: int, gpu: bool
) -> dict[str, Any]:
    check = {
        "name": "check",
        "image": _CHECK_IMAGE,
        "workingDir": "/parcel",
        "command": ["sha256sum", "-c", "SHA256SUMS"],
        "resources": {"requests": {"cpu": "500m", "memory": "64Mi"}, "limits": {"memory": "64Mi"}},
        "securityContext": _LOCKED,
        "volumeMounts": [_MOUNT],
    }
    server = _server(facts, file, name=name, size=size, context=context, parallel=parallel, gpu=gpu)
    user = {"runAsNonRoot": True, "runAsUser": 10001, "runAsGroup": 10001}
    pod = {
        "terminationGracePeriodSeconds": 60,
        "automountServiceAccountToken": False,
        "securityContext": {**user, "seccompProfile": {"type": "RuntimeDefault"}},
        "initContainers": [check],
        "containers": [server],
        "volumes": [{"name": "parcel", "persistentVolumeClaim": {"claimName": f"{name}-parcel", "readOnly": True}}],
    }
    labels = {"app": name}
    scraped = {"prometheus.io/scrape": "true", "prometheus.io/port": str(PORT), "prometheus.io/path": "/metrics"}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels, "annotations": scraped}, "spec": pod},
        },
    }


def _server(
    facts: ModelFacts, file: str, *, name: str, size: int, context: int, parallel: int, gpu: bool
) -> dict[str, Any]:
    """Return the container that answers; its memory is what the file, the cache of all sequences and the buffers take."""
    memory = f"{-(-(size + facts.cache_bytes * context * parallel + _SPARE) // _MIB)}Mi"
    key = {"name": f"{name}-key", "key": "key", "optional": True}
    return {
        "name": "server",
        "image": _IMAGES[gpu],
        "args": [
            *("-m", f"/parcel/{file}", "--host", "0.0.0.0", "--port", str(PORT), "--jinja", "--metrics"),
            *("-c", str(context * parallel), "--parallel", str(parallel)),
            *("--temp", f"{facts.temperature:g}", "--top-p", f"{facts.top_p:g}"),
            *(("-ngl", "999") if gpu else ()),
        ],
        "env": [{"name": "LLAMA_API_KEY", "valueFrom": {"secretKeyRef": key}}],
        "ports": [{"name": "http", "containerPort": PORT}],
        # Reading the file from a slow volume (20 MiB/s) may take long; after that a server that does not answer is restarted.
        "startupProbe": _probe(period=5, failures=max(12, size // (20 * _MIB) // 5)),
        "readinessProbe": _probe(period=5, failures=2),
        "livenessProbe": _probe(period=20, failures=6),
        "resources": {
            "requests": {"cpu": "2", "memory": memory},
            "limits": {"memory": memory, **({"nvidia.com/gpu": "1"} if gpu else {})},
        },
        "securityContext": _LOCKED,
        "volumeMounts": [_MOUNT],
    }


def _probe(*, period: int, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": "/health", "port": "http"},
        "periodSeconds": period,
        "timeoutSeconds": 3,
        "failureThreshold": failures,
    }


def prometheus_yaml(name: str) -> str:
    """Return a scrape job for `r1q serve` or llama-server on this machine; both have /metrics."""
    job = {
        "job_name": name,
        "metrics_path": "/metrics",
        "scrape_interval": "15s",
        "static_configs": [{"targets": [f"127.0.0.1:{PORT}"], "labels": {"model": name}}],
    }
    head = "# For prometheus.yml; with --api-key add: authorization: {credentials_file: …}\n"
    return head + str(yaml.safe_dump({"scrape_configs": [job]}, sort_keys=False))
