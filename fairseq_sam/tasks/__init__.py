"""Tasks that the papers need and fairseq lacks; fairseq imports them with the user dir."""
