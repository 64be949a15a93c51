"""The training loop shared by pretrain and finetune."""
