"""What ``make paper-tables`` runs: the paper's claims in the small."""
