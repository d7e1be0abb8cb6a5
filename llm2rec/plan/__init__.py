"""What a job will need before it is started: memory, time and disk, by arithmetic and by running it without memory."""
