"""HTTP API: routes over `app.jobs.queue`, one module for each noun."""
