"""`tokenrec launch`: training jobs on Cloud TPUs (launch/README.md).

Reading order: slices.py (what Google Cloud offers), job.py (a checked job), gke.py and
tpu_vm.py with tpu_vm.sh (rendering it for a service), start.py (starting it).
"""
