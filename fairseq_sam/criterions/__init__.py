"""Criteria that the papers need and fairseq lacks."""
