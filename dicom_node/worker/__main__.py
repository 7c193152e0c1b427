"""`python -m dicom_node.worker --fd N --lifeline N`: started by WorkerClient only."""

from dicom_node.worker.child import main

main()
