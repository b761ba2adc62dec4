"""The code of ``make paper-tables``: the paper's claims at a small scale."""
