"""Schemas of Kubernetes objects; unknown fields are errors.

`kubeflow_trainer_api` holds the schemas of pods, Services, autoscalers and JobSets. Those
of a Deployment and of a PodDisruptionBudget it does not have: the fields are those of
kubernetes.io/docs/reference/kubernetes-api.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

from kubeflow_trainer_api.models.io_k8s_api_autoscaling_v2_horizontal_pod_autoscaler import (
    IoK8sApiAutoscalingV2HorizontalPodAutoscaler,
)
from kubeflow_trainer_api.models.io_k8s_api_core_v1_pod_template_spec import (
    IoK8sApiCoreV1PodTemplateSpec,
)
from kubeflow_trainer_api.models.io_k8s_api_core_v1_service import IoK8sApiCoreV1Service
from kubeflow_trainer_api.models.io_k8s_apimachinery_pkg_api_resource_quantity import (
    IoK8sApimachineryPkgApiResourceQuantity,
)
from kubeflow_trainer_api.models.io_k8s_apimachinery_pkg_apis_meta_v1_label_selector import (
    IoK8sApimachineryPkgApisMetaV1LabelSelector,
)
from kubeflow_trainer_api.models.io_k8s_apimachinery_pkg_apis_meta_v1_object_meta import (
    IoK8sApimachineryPkgApisMetaV1ObjectMeta,
)
from kubeflow_trainer_api.models.io_k8s_apimachinery_pkg_util_intstr_int_or_string import (
    IoK8sApimachineryPkgUtilIntstrIntOrString,
)
from pydantic import BaseModel


class RollingUpdate(BaseModel):
    maxUnavailable: int | str | None = None
    maxSurge: int | str | None = None


class Strategy(BaseModel):
    type: Literal["RollingUpdate", "Recreate"]
    rollingUpdate: RollingUpdate | None = None


class DeploymentSpec(BaseModel):
    replicas: int | None = None
    selector: IoK8sApimachineryPkgApisMetaV1LabelSelector
    strategy: Strategy | None = None
    minReadySeconds: int | None = None
    revisionHistoryLimit: int | None = None
    paused: bool | None = None
    progressDeadlineSeconds: int | None = None
    template: IoK8sApiCoreV1PodTemplateSpec


class Deployment(BaseModel):
    apiVersion: Literal["apps/v1"]
    kind: Literal["Deployment"]
    metadata: IoK8sApimachineryPkgApisMetaV1ObjectMeta
    spec: DeploymentSpec


class DisruptionBudgetSpec(BaseModel):
    maxUnavailable: int | str | None = None
    minAvailable: int | str | None = None
    selector: IoK8sApimachineryPkgApisMetaV1LabelSelector
    unhealthyPodEvictionPolicy: str | None = None


class DisruptionBudget(BaseModel):
    apiVersion: Literal["policy/v1"]
    kind: Literal["PodDisruptionBudget"]
    metadata: IoK8sApimachineryPkgApisMetaV1ObjectMeta
    spec: DisruptionBudgetSpec


MODELS: dict[str, type[BaseModel]] = {
    "Deployment": Deployment,
    "HorizontalPodAutoscaler": IoK8sApiAutoscalingV2HorizontalPodAutoscaler,
    "PodDisruptionBudget": DisruptionBudget,
    "Service": IoK8sApiCoreV1Service,
}


def check(manifest: dict[str, Any]) -> None:
    """Validate a manifest by the schema of its kind."""
    MODELS[manifest["kind"]].model_validate(
        _wrap(copy.deepcopy(manifest)),
        strict=True,
        extra="forbid",
        by_alias=True,
        by_name=False,
    )


def wrap_quantities(container: dict[str, Any]) -> None:
    """Wrap the amounts of resources: the models take a quantity in no other way."""
    for amounts in container["resources"].values():
        for name, amount in amounts.items():
            amounts[name] = IoK8sApimachineryPkgApiResourceQuantity(amount)


def _wrap(manifest: dict[str, Any]) -> dict[str, Any]:
    """Wrap quantities, and numbers that may also be words."""
    either = IoK8sApimachineryPkgUtilIntstrIntOrString
    if manifest["kind"] == "Service":
        for port in manifest["spec"]["ports"]:
            port["targetPort"] = either(port["targetPort"])
    if manifest["kind"] == "Deployment":
        pod = manifest["spec"]["template"]["spec"]
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            wrap_quantities(container)
            for name, probe in container.items():
                if name.endswith("Probe"):
                    probe["httpGet"]["port"] = either(probe["httpGet"]["port"])
    return manifest
