"""What a run folder shows of its training: data for the screens, reports and pages that people watch a run with."""
