"""`tokenrec launch`: training jobs on TPUs and GPUs, and servers (launch/README.md).

Reading order: slices.py, gpus.py and machines.py (what there is to train on), job.py (a
checked job), gke.py with gke_pod.py, tpu_vm.py with tpu_vm.sh and slurm.py with slurm.sh
(rendering it for a service), start.py (starting it). Servers: server_job.py (a checked
plan), server_pod.py and server_manifests.py (rendering it).
"""
