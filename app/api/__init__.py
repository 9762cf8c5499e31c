"""HTTP: thin routes over `app.jobs`."""
