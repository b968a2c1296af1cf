"""Supervised fine-tuning on documents and chats, by the replay that distils (`redpen sft`)."""
