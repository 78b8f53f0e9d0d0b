"""Train any config of this project: hands it to the train.py of the library it is written for."""

from dispatch import main

if __name__ == '__main__':
    main('train')
