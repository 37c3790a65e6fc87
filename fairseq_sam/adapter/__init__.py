"""fairseq's edge: the only part that imports fairseq. Importing it registers everything."""

from fairseq_sam.adapter import checkpoints, compatibility, config, optimizers, seam

checkpoints.allow_checkpoint_classes()
optimizers.register_presets()
config.check_before_data_is_read()
seam.wrap_trainer()
compatibility.resume_with_the_same_batches()
