"""``fairseq-sam COMMAND``: the analyses of trained models as commands. Each module is one of them."""
