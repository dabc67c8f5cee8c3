"""`tokenrec launch`: training jobs on Cloud TPUs, and servers (launch/README.md).

Reading order: slices.py (what Google Cloud offers), job.py (a checked job), gke.py and
tpu_vm.py with tpu_vm.sh (rendering it for a service), start.py (starting it). Servers:
server_job.py (a checked plan), server_pod.py and server_manifests.py (rendering it).
"""
