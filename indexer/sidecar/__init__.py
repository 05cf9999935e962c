"""The process beside the daemon: it works off the jobs that wait in Postgres, and answers their API."""
