"""Connections to a PACS: the DICOM node that receives series, and the delivery of results."""
