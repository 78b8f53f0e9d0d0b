# First base of every config: bases are executed in order and before `custom_imports`, and only
# after this import do `mmtoken::` and, on the onedl stack, `mmseg::` bases resolve.
# An import statement would make MMEngine take this file for a lazy config.
__import__('mmtoken')

custom_imports = dict(imports=['mmtoken'], allow_failed_imports=False)
