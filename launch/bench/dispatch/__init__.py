"""suite=dispatch: a Ladder mixture of experts over shaped links: rows to all F ranks, to their home, or not apart."""
