"""Heads that predict masks from queries in the last blocks of a plain ViT.

They extend those of mmdet and mmseg, which nothing else here needs, so a config imports the one
that it uses, ``'mmtoken.heads.instance'`` or ``'mmtoken.heads.semantic'``, in ``custom_imports``.
"""
