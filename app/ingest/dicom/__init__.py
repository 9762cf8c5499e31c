"""Reader for DICOM. `app.ingest.reader` imports it only for a DICOM scan: its imports take two seconds."""
