"""fairseq's edge: the only part that imports fairseq. Importing it registers everything."""

from fairseq_sam.adapter import (
    amsgrad,
    checkpoints,
    compatibility,
    config,
    errors,
    gradient_log,
    help,
    optimizers,
    regularizers,
    seam,
)

errors.show_user_errors_in_one_line()
checkpoints.allow_checkpoint_classes()
checkpoints.explain_unreadable_checkpoints()
amsgrad.register_amsgrad()
optimizers.register_presets()
regularizers.register_regularized_criteria()
help.show_flags_in_help()
config.check_before_data_is_read()
seam.wrap_trainer()
gradient_log.log_gradients_when_clipped()
compatibility.resume_with_the_same_batches()
compatibility.run_with_numpy_2()
compatibility.unscale_once()
compatibility.bfloat16_is_not_a_tpu()
compatibility.find_nan_in_transformers()
compatibility.copy_checkpoints_whole()
compatibility.a_finished_run_stays_finished()
