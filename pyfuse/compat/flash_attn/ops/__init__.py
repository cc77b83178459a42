"""Operations of flash-attn below its layers."""
