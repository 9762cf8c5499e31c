"""Readers: files of any supported format -> `app.volume.Scan`. The entry point is `app.ingest.reader.read_scan`."""
